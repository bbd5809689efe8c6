"""Versions of registered models: made once for a content, named by aliases, pulled by anyone."""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from pipeline import store as folders
from pipeline.commands import command
from pipeline.config import validate
from pipeline.errors import PipelineError
from pipeline.inference import Calibration, FewShotClassifier
from pipeline.inference.classifier import MODEL
from pipeline.inference.files import read_json
from pipeline.nets import own_code
from pipeline.registry.masking import mask
from pipeline.registry.package import ARTIFACT, save_model
from pipeline.registry.publish import evaluation_of, result_name
from pipeline.registry.record import open_run, origin_tags
from pipeline.registry.tracking import RUN_TAG, Store, connect, make_client, reaching, registered_model, unknown_model
from pipeline.registry.tracking_config import TrackingConfig, check_model_name, naming, registering, store_uri
from pipeline.training.checkpoint import Checkpoint, load_checkpoint
from pipeline.training.models import whole_checkpoint
from pipeline.training.runs import CALIBRATION, EVALUATION, REPORT, best_checkpoint, read_run, step_of
from pipeline.weights import origin as weights_origin

CONTENT_TAG = "pipeline.content"  # SHA-256 of the model's description, which names that of its weights
_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: int
    run_id: str
    created: bool  # false when it was there already

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


def register_run(run_uri: str, tracking: Mapping[str, Any], name: str | None = None) -> Registered:
    """Register the best checkpoint of a run's folder, with what its ``report/`` holds: evaluation and calibration.

    ``name`` is by default the configuration's ``register_as``.
    """
    run = read_run(run_uri)
    name = name or run.config.get("register_as") or f"{run.spec['method']['name']}-{run.dataset['name']}"
    checkpoint = whole_checkpoint(load_checkpoint(best_checkpoint(run.uri)))
    evaluation = evaluation_of(run)
    if not evaluation and folders.exists(folders.join(run.uri, REPORT, EVALUATION)):
        again = command("evaluate", f"run={run.uri}", "publish=true", *naming(tracking))
        print(
            f"note: what the report of run {run.name} has measured is not of step {checkpoint.step}, which is "
            f"registered without accuracies and without a threshold for unknown; measure it with: {again}",
            flush=True,
        )
    return register(run.name, checkpoint, tracking, name, evaluation, calibration_of(run.uri), run.uri)


def register(
    run_name: str,
    checkpoint: Checkpoint,
    tracking: Mapping[str, Any],
    name: str,
    evaluation: Sequence[Mapping[str, Any]] = (),
    calibration: Calibration | None = None,
    folder: str | None = None,
) -> Registered:
    """Make a version of the registered model ``name`` from a checkpoint, once.

    The same run, weights and calibration registered again give the version that is there, and an interrupted
    registration is finished.

    Args:
        evaluation: results with split, way, shot, query, episodes, seed, accuracy and interval; they become tags.
        calibration: thresholds for 'unknown'; without, the model knows every query.
        folder: of the run, by which a later try finds it.

    Raises:
        PipelineError: the store is away, or refuses the name.
    """
    check_model_name(name)
    origin = {"run": run_name, "step": checkpoint.step, "dataset": mask(checkpoint.dataset)}
    classifier = FewShotClassifier.from_weights(checkpoint.spec, checkpoint.model, calibration, origin)
    other = None if name == checkpoint.config.get("register_as") else name
    with reaching(tracking, f"register the run later with: {registering(folder or run_name, tracking, other)}"):
        store = connect(tracking)
        content = _content(classifier)
        found = _version_of(store.client, name, run_name, content)
        tags = _tags(run_name, content, checkpoint, evaluation)
        created = found is None
        if found is None:
            run_id = open_run(store, run_name, checkpoint.config, checkpoint.dataset)
            found = _make_version(store, name, run_id, classifier, tags)
        for key, value in tags.items():  # an evaluation that was made since is added; where it came from stays
            measured = key.startswith(("accuracy.", "interval.", "episodes."))
            if key not in found.tags or (measured and found.tags[key] != value):
                store.client.set_model_version_tag(name, str(found.version), key, value)
    return Registered(name, int(found.version), str(found.run_id), created)


def set_alias(tracking: Mapping[str, Any], name: str, alias: str, version: int) -> None:
    """Let ``models:/name@alias`` be ``version``."""
    with reaching(tracking, "try again"):
        _client(tracking).set_registered_model_alias(name, alias, str(version))


def pull(model_uri: str, tracking: Mapping[str, Any], device: str = "cpu") -> FewShotClassifier:
    """The classifier of ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

    Weights and description alone are fetched and read, and no code of the model runs, but that of a network of one's
    own (``backbone=module``): where this machine does not have it, it is what the registered model carries.
    """
    match = _URI.fullmatch(model_uri)
    if match is None:
        raise PipelineError(f"model={model_uri}: give models:/NAME@ALIAS, models:/NAME/VERSION or a folder")
    with reaching(tracking, "check tracking.uri and try again"):
        client = _client(tracking)
        version = _find_version(client, match)
        location = client.get_model_version_download_uri(version.name, str(version.version))
        with tempfile.TemporaryDirectory() as folder:
            path = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{location}/artifacts/{ARTIFACT}", dst_path=folder, tracking_uri=client.tracking_uri
            )
            _bring_code(Path(path), location, client)
            return FewShotClassifier.load(path, device)


def _bring_code(classifier: Path, location: str, client: MlflowClient) -> None:
    """Fetch the user's own network that the described model needs, where this machine does not have it."""
    backbone = read_json(classifier / MODEL, "pull the model again").get("spec", {}).get("backbone", {})
    digest = backbone.get("code_sha256")
    if digest is None or own_code.known(digest, backbone.get("path")):
        return
    found = mlflow.artifacts.download_artifacts(
        artifact_uri=f"{location}/code/{own_code.FOLDER}/{digest}/sources.json",
        dst_path=str(classifier.parent / "code"), tracking_uri=client.tracking_uri,
    )  # fmt: skip
    own_code.send(json.loads(Path(found).read_text("utf-8")))


def calibration_of(run_uri: str) -> Calibration | None:
    """The calibration in the run's ``report/calibration.json``, unless it is of another checkpoint than the run stands
    for now."""
    where = folders.join(run_uri, REPORT, CALIBRATION)
    if not folders.exists(where):
        return None
    try:
        content = json.loads(folders.read_bytes(where))
        found, step = Calibration.from_dict(content), step_of(best_checkpoint(run_uri))
        return found if content.get("step", step) == step else None  # earlier code wrote none
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{where} is no calibration ({type(error).__name__}: {error}); calibrate again") from error


def _client(tracking: Mapping[str, Any]) -> MlflowClient:
    return make_client(store_uri(validate(TrackingConfig, dict(tracking)), make=False))


def _make_version(
    store: Store, name: str, run_id: str, classifier: FewShotClassifier, tags: dict[str, str]
) -> ModelVersion:
    identity = {key: tags[key] for key in (RUN_TAG, CONTENT_TAG)}
    wanted = " AND ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
    begun = store.client.search_logged_models([store.experiment_id], filter_string=wanted, max_results=1)
    model = begun[0] if begun else store.client.create_logged_model(store.experiment_id, ARTIFACT, run_id, identity)
    if not begun or str(model.status) != "READY":
        with tempfile.TemporaryDirectory() as folder:
            save_model(classifier, f"{folder}/model", Model(model_id=model.model_id, run_id=run_id))
            store.client.log_model_artifacts(model.model_id, f"{folder}/model")
        store.client.finalize_logged_model(model.model_id, "READY")
    try:
        store.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # A server resolves a model's id itself and takes no path; a database's client would ask the default store for it.
    source = f"models:/{model.model_id}" if store.uri.startswith("http") else model.artifact_location
    return store.client.create_model_version(name, source, run_id, tags=tags, model_id=model.model_id)


def _version_of(client: MlflowClient, name: str, run_name: str, content: str) -> ModelVersion | None:
    """The first version of this run and content."""
    wanted = {RUN_TAG: run_name, CONTENT_TAG: content}
    known = client.search_model_versions(f"name='{name}'")
    mine = [version for version in known if wanted.items() <= version.tags.items()]
    return min(mine, key=lambda version: int(version.version), default=None)


def _find_version(client: MlflowClient, match: re.Match[str]) -> ModelVersion:
    name, alias, version = match["name"], match["alias"], match["version"]
    try:
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise PipelineError(f"model={match[0]}: {_known_versions(client, name)}") from error


def _known_versions(client: MlflowClient, name: str) -> str:
    model = registered_model(client, name)
    if model is None:
        return unknown_model(client, name)
    aliases = [f"@{alias} (version {version})" for alias, version in sorted(model.aliases.items())]
    latest = max((int(v.version) for v in client.search_model_versions(f"name='{name}'")), default=0)
    named = ", ".join(aliases) or "no alias"
    return f"there is no such version of {name!r}; it has versions up to {latest} and {named}"


def _content(classifier: FewShotClassifier) -> str:
    """SHA-256 of what makes the model, wherever and whenever it is saved."""
    calibration = None if classifier.calibration is None else classifier.calibration.to_dict()
    described = [classifier.fingerprint, calibration, classifier.origin]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _tags(
    run_name: str, content: str, checkpoint: Checkpoint, evaluation: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Where a version came from, how good it is, and on which episodes that was measured."""
    tags = {
        RUN_TAG: run_name,
        CONTENT_TAG: content,
        "step": str(checkpoint.step),
        **origin_tags(mask(checkpoint.config), checkpoint.dataset),
    }
    if (pretrained := weights_origin(checkpoint.spec["backbone"])) is not None:
        tags["backbone.weights"] = pretrained
    for result in sorted(evaluation, key=lambda result: result.get("split") == "test"):  # which a tag is of, if it can
        tags[f"accuracy.{result_name(result)}"] = f"{result['accuracy']:.6f}"
        tags[f"interval.{result_name(result)}"] = f"{result['interval']:.6f}"
        measured = {key: result[key] for key in ("split", "way", "shot", "query", "episodes", "seed") if key in result}
        tags[f"episodes.{result_name(result)}"] = json.dumps(measured, sort_keys=True)
    return tags
