"""Which classes a model was trained on: kept with its weights, and never measured by mistake."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.data.manifest import Manifest, turned_name
from pipeline.errors import PipelineError, some

TRAINED = "trained"  # key of a run's, a checkpoint's and a model's dataset, and of the source of features
SPLIT = "split"  # key of the same dataset: which of its splits was trained on; runs of earlier code have none
_LENGTH = 12  # hexadecimal digits: a mistaken match among 10,000 classes is one in a million


def trained_classes(manifest: Manifest, split: str, before: Iterable[str] = ()) -> list[str]:
    """Digests of the classes of ``split`` ("train", or "train+val"), and of those that were trained on ``before``.

    Digests, since names of classes may be names of people, and a model is given away.
    """
    return sorted({*before, *map(_digest, _names(manifest, split))})


def with_turns(trained: Iterable[str], manifest: Manifest) -> list[str]:
    """The same digests, and those of features of the classes of ``manifest`` that count turned."""
    known = set(trained)
    seen = [name for name in manifest.class_names if _digest(name) in known]
    return sorted(known.union(_digest(turned_name(name, turn)) for name in seen for turn in manifest.rotations))


def seen_classes(dataset: Mapping[str, Any], manifest: Manifest, split: str, contest: bool = False) -> list[str]:
    """The classes of ``split`` that a model was trained on.

    A dataset's own splits have no class in common, and whoever asks for that of the training means it: only what the
    first weights were trained on can be elsewhere, or another dataset or a later version of the same be asked for.

    Args:
        dataset: what it was trained on: name, fingerprint, split, and digests of the classes.
        contest: it meets another model, which may be trained on another split: then its own counts too.
    """
    trained, own = set(dataset.get(TRAINED, [])), set[str]()
    if dataset.get("fingerprint") == manifest.fingerprint and not contest:
        if SPLIT not in dataset:
            return []
        own = set(_names(manifest, dataset[SPLIT]))
    return [name for name in _names(manifest, split) if name not in own and _digest(name) in trained]


def refuse_seen(
    label: str,
    dataset: Mapping[str, Any],
    manifest: Manifest,
    split: str,
    instead: str = "measure them too with seen=true",
    contest: bool = False,
) -> None:
    """Refuse to measure a model on classes that it was trained on.

    Args:
        dataset, contest: see :func:`seen_classes`. Models of earlier code have no digests; where they are measured on
            another version of their data, that is said.
    """
    if TRAINED not in dataset:
        if dataset.get("name") == manifest.name and dataset.get("fingerprint") != manifest.fingerprint:
            print(
                f"note: dataset {manifest.name!r} has changed since {label} was trained, and {label} does not tell its "
                "training classes: some may be measured here",
                flush=True,
            )
        return
    if seen := seen_classes(dataset, manifest, split, contest):
        raise PipelineError(
            f"{label} was trained on {len(seen):,} classes of split {split!r} of dataset {manifest.name!r}: "
            f"{some(list(map(repr, seen)))}; "
            f"keep every class in its split (data.source.splits=FILE), or {instead}"
        )


def _names(manifest: Manifest, split: str) -> list[str]:
    return [manifest.class_names[number] for part in split.split("+") for number in manifest.splits.get(part, [])]


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_LENGTH]
