"""Which classes are trained on, validated on and tested on."""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from pipeline.data.philox import key_of, uniforms
from pipeline.data.sources.base import Report
from pipeline.errors import PipelineError
from pipeline.options import fits

Splits = dict[str, list[str]]


def published(name: str) -> Splits:
    """A split that comes with the package: ``omniglot_vinyals``, ``cifar_fs``, ``fc100``, ``mini_imagenet_ravi``."""
    text = resources.files("pipeline.data").joinpath("splits", f"{name}.json").read_text("utf-8")
    return dict(json.loads(text)["classes"])


def from_file(path: str) -> Splits:
    """Splits from JSON: ``{"train": [class, ...], "val": [...], "test": [...]}``, also under a key "classes"."""
    if not Path(path).is_file():
        raise PipelineError(
            f"data.source.splits={path}: {'it is no' if Path(path).exists() else 'there is no such'} file"
        )
    try:
        content = json.loads(Path(path).read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise PipelineError(f"data.source.splits={path} is not a JSON file ({error})") from error
    splits = content.get("classes", content) if isinstance(content, dict) else content
    if not fits(splits, Splits):
        raise PipelineError(f'data.source.splits={path} does not hold {{"train": [class names], ...}}')
    splits = {split: [unicodedata.normalize("NFC", name) for name in names] for split, names in splits.items()}
    owner: dict[str, str] = {}
    for split, names in splits.items():
        for name in names:
            if name in owner:
                raise PipelineError(f"data.source.splits={path}: class {name!r} is in {owner[name]!r} and in {split!r}")
            owner[name] = split
    return splits


def by_fractions(classes: Sequence[str], fractions: Mapping[str, float], seed: int) -> Splits:
    """Shares of the classes, drawn by seed: each class gets a number from its name, and the smallest go first.

    Every split gets at least one class; rounding favours the first. Listed in the order of ``classes``.
    """
    total = sum(fractions.values())
    if not fractions or any(share <= 0 for share in fractions.values()) or total > 1 + 1e-9:
        raise PipelineError(f"data.source.fractions={dict(fractions)} must be positive shares that add up to 1 at most")
    if len(classes) < len(fractions):
        raise PipelineError(f"{len(classes)} classes cannot fill the splits {', '.join(fractions)}: each needs one")
    drawn = sorted(classes, key=lambda name: (draw(name, seed), name))
    counts = _counts(len(classes), fractions)
    splits, start = {}, 0
    for split, count in counts.items():
        members = set(drawn[start : start + count])
        splits[split] = [name for name in classes if name in members]
        start += count
    return splits


def by_name(classes: Sequence[str], fractions: Mapping[str, float], seed: int) -> Splits:
    """Shares of the classes, drawn by seed from each class's name alone: new classes never move the others.

    Shares are met on average only. A split that gets no class takes, from the largest, the one drawn nearest to it.
    """
    by_fractions(classes, fractions, seed)  # refuses what cannot be
    ends = np.cumsum(list(fractions.values()))
    drawn = {name: draw(name, seed) for name in classes}
    members: dict[str, set[str]] = {split: set() for split in fractions}
    for name, number in drawn.items():
        position = int(np.searchsorted(ends, number, side="right"))
        if position == len(ends) and ends[-1] > 1 - 1e-9:
            position -= 1  # shares that add up to 1, but for rounding, leave no class out
        if position < len(ends):
            members[list(fractions)[position]].add(name)
    for (split, share), end in zip(fractions.items(), ends, strict=True):
        if not members[split]:
            largest = max(members, key=lambda other: len(members[other]))
            middle = end - share / 2
            pool = members[largest] if len(members[largest]) > 1 else set(classes) - set().union(*members.values())
            nearest = min(pool, key=lambda name: (abs(drawn[name] - middle), name))
            members[largest].discard(nearest)
            members[split].add(nearest)
    return {split: [name for name in classes if name in names] for split, names in members.items()}


def keep(chosen: Splits, classes: Sequence[str], kept: Mapping[str, str], report: Report) -> Splits:
    """``chosen`` with every one of ``classes`` that ``kept`` (class -> split) names in the split that it has there."""
    drawn = {name: split for split, names in chosen.items() for name in names}
    owner = {**drawn, **{name: kept[name] for name in classes if name in kept}}
    moved = [name for name in owner if owner[name] != drawn.get(name)]
    if not moved:
        return chosen
    names_of = dict.fromkeys([*chosen, *sorted(set(owner.values()))])
    splits = {split: [name for name in classes if owner.get(name) == split] for split in names_of}
    report(f"{len(moved):,} classes stay in the split that they have in the dataset; another data.name draws anew")
    lost = [split for split, names in splits.items() if not names and split in kept.values()]
    if lost:
        raise PipelineError(
            f"split {lost[0]!r} would have no class: those that it has in the dataset are gone, and the others keep "
            "their splits; choose another data.name for other splits"
        )
    return {split: names for split, names in splits.items() if names}


def refuse_moves(chosen: Splits, kept: Mapping[str, str], given_by: str) -> None:
    """Refuse splits that were given and contradict those of the dataset that they would replace."""
    for split, names in chosen.items():
        for name in names:
            if kept.get(name, split) != split:
                raise PipelineError(
                    f"{given_by}: class {name!r} is for {kept[name]} in the dataset that is there, and would be for "
                    f"{split}: what was trained on it would be tested on it; choose another data.name for other splits"
                )


def _counts(total: int, fractions: Mapping[str, float]) -> dict[str, int]:
    counts = {split: max(1, int(total * share + 1e-9)) for split, share in fractions.items()}
    first = next(iter(counts))
    if sum(fractions.values()) > 1 - 1e-9 or sum(counts.values()) > total:
        counts[first] += total - sum(counts.values())
    while counts[first] < 1:
        largest = max(counts, key=lambda split: counts[split])
        counts[largest] -= 1
        counts[first] += 1
    return counts


def draw(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on the name and the seed alone, not on the other names."""
    return float(uniforms(key_of("split", seed, name), np.zeros(1), 1)[0, 0])


def require(splits: Splits, classes: set[str], where: str) -> None:
    """Refuse a source that lacks classes of its published split."""
    missing = [name for names in splits.values() for name in names if name not in classes]
    if missing:
        raise PipelineError(
            f"{where} lacks {len(missing)} classes of the split, such as {missing[0]!r}; is this the right archive?"
        )
