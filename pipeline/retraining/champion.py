"""The champion that is challenged: what it was trained on, how old it is, its weights."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import store
from pipeline.data.manifest import Manifest
from pipeline.errors import PipelineError
from pipeline.evaluation.seen import TRAINED
from pipeline.registry.aliases import CHAMPION
from pipeline.registry.tracking import RUN_TAG, connect, reaching, registered_model
from pipeline.registry.versions import pull
from pipeline.training.checkpoint import STATE, Checkpoint, save_checkpoint

DATASETS = "datasets"


@dataclass(frozen=True)
class Champion:
    """The version in office."""

    name: str
    version: int
    made: float  # seconds since 1970
    fingerprint: str | None  # of the data it was trained on; None: it does not say


def champion_of(tracking: Mapping[str, Any], name: str) -> Champion | None:
    """The champion of a registered model; None where there is none, or no such model yet."""
    with reaching(tracking, "nothing was done; run again"):
        client = connect(tracking).client
        model = registered_model(client, name)
        if model is None or CHAMPION not in model.aliases:
            return None
        found = client.get_model_version(name, model.aliases[CHAMPION])
        fingerprint = found.tags.get("dataset.fingerprint")
        return Champion(name, int(found.version), found.creation_timestamp / 1000, fingerprint)


def made_at(tracking: Mapping[str, Any], name: str) -> float:
    """When the registered model of this name was made, in seconds since 1970; infinite where there is none."""
    with reaching(tracking, "nothing was done; run again"):
        model = registered_model(connect(tracking).client, name)
        return math.inf if model is None else model.creation_timestamp / 1000


def is_there(tracking: Mapping[str, Any], name: str, version: int, run: str) -> bool:
    """Whether a version is the one that was made of ``run``: that of a deleted model may have its number."""
    with reaching(tracking, "nothing was done; run again"):
        found = connect(tracking).client.search_model_versions(f"name='{name}'")
        return any(int(known.version) == version and known.tags.get(RUN_TAG) == run for known in found)


def keep_classes(folder: str, manifest: Manifest) -> None:
    """Note which classes were in which split, so that a champion can be asked what it has seen when they change."""
    where = _classes_file(folder, manifest.fingerprint)
    if not store.exists(where):
        names = {split: [manifest.class_names[n] for n in members] for split, members in manifest.splits.items()}
        store.write_bytes(where, (json.dumps({"name": manifest.name, "splits": names}) + "\n").encode())


def refuse_seen_classes(folder: str, champion: Champion, manifest: Manifest, train_split: str, test_split: str) -> None:
    """Refuse to measure a champion on classes that it was trained on, as far as that is known.

    Raises:
        PipelineError: names one of them, and what to do.
    """
    if champion.fingerprint is None or champion.fingerprint == manifest.fingerprint:
        return
    where = _classes_file(folder, champion.fingerprint)
    if not store.exists(where):
        return
    trained = json.loads(store.read_bytes(where))["splits"]
    seen = {name for split in train_split.split("+") for name in trained.get(split, [])}
    asked = [manifest.class_names[n] for split in test_split.split("+") for n in manifest.splits.get(split, [])]
    moved = [name for name in asked if name in seen]
    if moved:
        raise PipelineError(
            f"{len(moved)} classes of split {test_split!r}, such as {moved[0]!r}, were in training when champion "
            f"{champion.version} of {champion.name!r} was made: no fair comparison; keep every class in its split, by "
            "data.source.splits=FILE or, for a folder, data.source.grows=true"
        )


def keep_weights(folder: str, champion: Champion, tracking: Mapping[str, Any]) -> str:
    """The champion's weights as a checkpoint that every worker reaches; its URI."""
    made = round(1000 * champion.made)  # a model that was deleted and made again has the same numbers
    uri = store.join(folder, f"champion-{champion.version}-{made}")
    if not store.exists(store.join(uri, STATE)):
        classifier = pull(f"models:/{champion.name}/{champion.version}", tracking)
        weights = dict(classifier.method.state_dict())
        trained = (classifier.origin.get("dataset") or {}).get(TRAINED, [])
        origin = {"name": "", "fingerprint": champion.fingerprint, "uri": "", TRAINED: trained}
        save_checkpoint(uri, Checkpoint(0, classifier.spec, {}, origin, {}, [], weights))
    return uri


def _classes_file(folder: str, fingerprint: str) -> str:
    return store.join(folder, DATASETS, f"{fingerprint}.json")
