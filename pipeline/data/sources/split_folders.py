"""Folders named train, val and test above the classes: splits, and no part of a class's name."""

from pipeline.data.sources.base import Report
from pipeline.data.sources.splits import Splits
from pipeline.data.sources.tree import Classes, folded
from pipeline.errors import PipelineError, some

SPLIT_OF = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


def recognise(classes: Classes, where: str, same_names: bool, report: Report) -> tuple[Classes, Splits | None]:
    """Classes without the folders of splits above them, and the splits that those folders are; ``report`` says so.

    Where train, val and test hold the same classes, as for a classifier of known classes, every class is one class of
    all its images, and no split is given: few-shot learning needs other classes in every split. Where only some are
    shared, nobody can know what was meant: refused, unless ``same_names`` lets them be different classes.
    """
    found = _by_split(classes)
    if found is None:
        _say_doubtful(classes, where, report)
        return classes, None
    merged: Classes = {}
    for split in found.values():
        for name, entries in split.items():
            merged[name] = sorted(merged.get(name, []) + entries)
    counts = ", ".join(f"{len(names):,} {split}" for split, names in found.items())
    if len(merged) == sum(map(len, found.values())):
        report(f"{where} is a folder of splits: its classes stay where they lie ({counts})")
        return merged, {split: sorted(names) for split, names in found.items()}
    if same_names:
        return classes, None
    if all(names.keys() == merged.keys() for names in found.values()):
        folders = " and ".join(found)
        report(
            f"{where} is a folder of splits with the same {len(merged):,} classes in {folders}: the images of a class "
            "are put together, and whole classes are drawn for every split"
        )
        return merged, None
    shared = [repr(name) for name in merged if sum(name in names for names in found.values()) > 1]
    are = "is" if len(shared) == 1 else "are"
    raise PipelineError(
        f"{where} is a folder of splits ({counts}), but {some(shared)} {are} in more than one of them: move the images "
        "of a class to one folder, or give data.source.same_names=true if they are different classes of the same name"
    )


def refuse_same_names(splits: Splits) -> None:
    """Refuse classes of different splits whose last folders have one name: x/cat would be learnt and y/cat tested."""
    owners: dict[str, tuple[str, str]] = {}
    pairs = []
    for split, names in splits.items():
        for name in names:
            other, owner = owners.setdefault(folded(name.rpartition("/")[2]), (name, split))
            if owner != split:
                pairs.append((other, owner, name, split))
    if pairs and len(owners) > 1:  # one name under all classes ("cat/images", "dog/images") tells nothing
        other, owner, name, split = pairs[0]
        more = f" ({len(pairs):,} such pairs)" if len(pairs) > 1 else ""
        raise PipelineError(
            f"class {other!r} is for {owner} and {name!r} for {split}{more}: are they one class? Put its images in one "
            "folder, or give data.source.same_names=true if they are different classes of the same name"
        )


def _by_split(classes: Classes) -> dict[str, Classes] | None:
    """Classes by the split that their first folder names; None where a folder names none, or two name the same."""
    found: dict[str, Classes] = {split: {} for split in ("train", "val", "test")}
    folders: dict[str, str] = {}
    for name, entries in classes.items():
        folder, _, rest = name.partition("/")
        split = SPLIT_OF.get(folder.casefold())
        if split is None or not rest or folders.setdefault(split, folder) != folder:
            return None
        found[split][rest] = entries
    return {split: names for split, names in found.items() if names} if len(folders) > 1 else None


def _say_doubtful(classes: Classes, where: str, report: Report) -> None:
    """Folders that are named like splits, beside others that are not, are a part of the classes' names: say so."""
    folders = dict.fromkeys(name.partition("/")[0] for name in classes if "/" in name)
    splits = [folder for folder in folders if folder.casefold() in SPLIT_OF]
    others = [name for name in classes if name.partition("/")[0] not in splits]
    direct = [name for name in classes if name in splits]
    if len(splits) > 1:
        why = f"stand beside {others[0].partition('/')[0]!r}" if others else "name a split twice"
        why = f"hold images beside their classes ({direct[0]})" if direct else why
        report(
            f"{where}: the folders {', '.join(splits)} {why}, and are taken as a part of the classes' names, not as "
            "splits; if they are splits, make them the only folders, or give data.source.splits=FILE"
        )
