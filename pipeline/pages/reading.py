"""What the tracking store holds, read for pages. All of it is somebody's text: nothing is run, nothing is believed."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.config import validate
from pipeline.registry.aliases import CHALLENGER, CHAMPION
from pipeline.registry.tracking import RUN_TAG, STORE_ERRORS, all_models, make_client, paged
from pipeline.registry.tracking_config import TrackingConfig, sqlite_file, store_uri

CAMPAIGN_TAG = "pipeline.campaign"
LOCK = ".promotion-lock"  # the end of a registered model's name that is a lock
LARGEST, LARGEST_TEXT = 32 * 2**20, 8 * 2**20  # bytes of a file, of a file that is parsed
PAGE = 200  # entries of one answer of the store
_ACCURACY = re.compile(r"[^/]+/accuracy_\d+way_\d+shot")


@dataclass(frozen=True)
class Version:
    """A version of a registered model, with the run that made it, where there is one."""

    entity: ModelVersion
    run: Run | None

    @property
    def number(self) -> int:
        return int(self.entity.version)

    @property
    def tags(self) -> dict[str, str]:
        return dict(self.entity.tags)

    @property
    def accuracies(self) -> dict[str, tuple[float, float]]:
        """Share and half-width of its interval by setting ("5-way 1-shot"), as its tags have them, or NaN."""
        settings = [key.removeprefix("accuracy.") for key in sorted(self.tags) if key.startswith("accuracy.")]
        return {
            setting.replace("way_", "-way ").replace("shot", "-shot"): (
                _float(self.tags[f"accuracy.{setting}"]), _float(self.tags.get(f"interval.{setting}", "nan"))
            )
            for setting in settings
        }  # fmt: skip


@dataclass(frozen=True)
class Registered:
    entity: RegisteredModel
    versions: list[Version]  # newest first

    @property
    def name(self) -> str:
        return str(self.entity.name)

    @property
    def aliases(self) -> dict[str, int]:
        return {str(alias): int(version) for alias, version in (self.entity.aliases or {}).items()}

    @property
    def shown(self) -> Version | None:
        """The version that stands for the model: the champion, or the challenger, or the newest."""
        by_number = {version.number: version for version in self.versions}
        named = [by_number.get(self.aliases.get(alias, 0)) for alias in (CHAMPION, CHALLENGER)]
        return next((version for version in [*named, *self.versions] if version), None)


@dataclass
class Site:
    """All that pages are made of."""

    files: Files
    tracking: Mapping[str, Any] = field(default_factory=dict)  # the store that it was read from
    models: list[Registered] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)  # with test accuracies, newest first
    campaigns: list[tuple[Run, list[Run]]] = field(default_factory=list)  # with their trials, newest first


def read_site(tracking: Mapping[str, Any]) -> Site:
    """Read the store that ``tracking`` names. Nothing is made there, not even the store."""
    config = validate(TrackingConfig, dict(tracking))
    file = sqlite_file(config.uri)
    if file is not None and not file.exists():
        return Site(Files(None), tracking)
    client = make_client(store_uri(config, make=False))
    site = Site(Files(client), tracking)
    experiment = client.get_experiment_by_name(config.experiment)
    runs = {run.info.run_id: run for run in (_runs_of(client, experiment.experiment_id) if experiment else ())}
    children: dict[str, list[Run]] = {}
    for run in runs.values():
        children.setdefault(run.data.tags.get(MLFLOW_PARENT_RUN_ID, ""), []).append(run)
    site.runs = [run for run in runs.values() if any(map(_ACCURACY.fullmatch, run.data.metrics))]
    site.campaigns = [(run, children.get(run.info.run_id, [])) for run in runs.values() if _is_campaign(run)]
    site.models = [_registered(client, model, runs) for model in all_models(client) if not model.name.endswith(LOCK)]
    return site


def name_of(run: Run) -> str:
    """The pipeline's name of a run, or the store's."""
    return str(run.data.tags.get(RUN_TAG) or run.info.run_name)


def _is_campaign(run: Run) -> bool:
    """Its tag is set at its end: one that runs is known by what it searches."""
    tags, params = run.data.tags, run.data.params
    return MLFLOW_PARENT_RUN_ID not in tags and (
        CAMPAIGN_TAG in tags or ("trials" in params and "search.kind" in params)
    )


def _runs_of(client: MlflowClient, experiment: str) -> Iterator[Run]:
    newest = ["attributes.start_time DESC"]
    return paged(lambda token: client.search_runs([experiment], max_results=PAGE, order_by=newest, page_token=token))


def _registered(client: MlflowClient, model: RegisteredModel, runs: dict[str, Run]) -> Registered:
    quoted = "'" in model.name  # jobs.register makes none such, and the store's search has no way to quote it
    found = [] if quoted else client.search_model_versions(f"name='{model.name}'")
    versions = [Version(version, _run_of(client, version.run_id, runs)) for version in found]
    return Registered(model, sorted(versions, key=lambda version: -version.number))


def _run_of(client: MlflowClient, run_id: str | None, runs: dict[str, Run]) -> Run | None:
    if not run_id:
        return None
    if run_id not in runs:
        try:
            runs[run_id] = client.get_run(run_id)
        except MlflowException:  # it was deleted
            return None
    return runs[run_id]


class Files:
    """Artifacts of runs, by name, within limits. What is missing, too large or damaged is None."""

    def __init__(self, client: MlflowClient | None) -> None:
        self._client = client
        self._sizes: dict[tuple[str, str], dict[str, int]] = {}
        self.problems: list[str] = []  # what is there and could not be read

    def metric(self, run_id: str, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric over time."""
        if self._client is None:
            return []
        history = {point.step: float(point.value) for point in self._client.get_metric_history(run_id, name)}
        return sorted(history.items())

    def read(self, run_id: str, name: str, limit: int = LARGEST) -> bytes | None:
        """A file; ``name`` is one of this package's constants."""
        if self._client is None:
            return None
        folder = name.rpartition("/")[0]
        try:
            if (run_id, folder) not in self._sizes:
                listed = self._client.list_artifacts(run_id, folder or None)
                self._sizes[run_id, folder] = {i.path: int(i.file_size or 0) for i in listed if not i.is_dir}
            size = self._sizes[run_id, folder].get(name)
            if size is None:
                return None
            if size > limit:
                self.problems.append(f"{name} of run {run_id} is larger than {limit // 2**20} MB")
                return None
            with tempfile.TemporaryDirectory() as target:
                return Path(self._client.download_artifacts(run_id, name, target)).read_bytes()
        except STORE_ERRORS as error:
            self.problems.append(f"{name} of run {run_id} could not be fetched ({type(error).__name__})")
            return None

    def json(self, run_id: str, name: str) -> Any:
        return self._parsed(run_id, name, json.loads)

    def yaml(self, run_id: str, name: str) -> Any:
        return self._parsed(run_id, name, lambda text: yaml.load(text, _Plain))

    def json_lines(self, run_id: str, name: str) -> list[Any]:
        found = self._parsed(run_id, name, lambda text: [json.loads(line) for line in text.splitlines() if line])
        return found or []

    def text(self, run_id: str, name: str) -> str | None:
        content = self.read(run_id, name, LARGEST_TEXT)
        return None if content is None else content.decode("utf-8", "replace")

    def _parsed(self, run_id: str, name: str, parse: Any) -> Any:
        text = self.text(run_id, name)
        if text is None:
            return None
        try:
            return parse(text)
        except (ValueError, RecursionError, yaml.YAMLError):
            self.problems.append(f"{name} of run {run_id} is damaged")
            return None


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


class _Plain(yaml.SafeLoader):
    """Without aliases, by which a few lines become gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)
