"""Which classes a model was trained on: kept with its weights, and never measured by mistake."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.data.manifest import Manifest
from pipeline.errors import PipelineError, some

TRAINED = "trained"  # key of a run's, a checkpoint's and a model's dataset
_LENGTH = 12  # hexadecimal digits: a mistaken match among 10,000 classes is one in a million


def trained_classes(manifest: Manifest, split: str, before: Iterable[str] = ()) -> list[str]:
    """Digests of the classes of ``split`` ("train", or "train+val"), and of those that were trained on ``before``.

    Digests, since names of classes may be names of people, and a model is given away.
    """
    return sorted({*before, *map(_digest, _names(manifest, split))})


def refuse_seen(label: str, dataset: Mapping[str, Any], manifest: Manifest, split: str) -> None:
    """Refuse to measure a model on classes that it was trained on.

    A dataset's own splits have no class in common: only another one, or a later version of the same, can hold them.

    Args:
        label: of the model, for messages.
        dataset: what it was trained on: name, fingerprint and digests of the classes. Models of earlier code have no
            digests; where they are measured on another version of their data, that is said.
    """
    if dataset.get("fingerprint") == manifest.fingerprint:
        return
    if TRAINED not in dataset:
        if dataset.get("name") == manifest.name:
            print(
                f"note: dataset {manifest.name!r} has changed since {label} was trained, and {label} does not tell its "
                "training classes: some may be measured here",
                flush=True,
            )
        return
    trained = set(dataset[TRAINED])
    seen = [name for name in _names(manifest, split) if _digest(name) in trained]
    if seen:
        raise PipelineError(
            f"{label} was trained on {len(seen):,} classes of split {split!r} of dataset {manifest.name!r}: "
            f"{some(list(map(repr, seen)))}; "
            "keep every class in its split (data.source.splits=FILE), or measure them too with seen=true"
        )


def _names(manifest: Manifest, split: str) -> list[str]:
    return [manifest.class_names[number] for part in split.split("+") for number in manifest.splits.get(part, [])]


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_LENGTH]
