"""Anybody's images: one folder a class, in a folder or a zip archive.

Any format that Pillow reads, of any size and mode. A class is named by its folders below those that all classes share.
Transparent pixels become white; photographs are turned as their camera notes; images of another shape than ``shape``
are cut to their central part and resized bilinearly.
"""

from collections.abc import Mapping, Sequence

from pipeline.data.images import MAX_PIXELS
from pipeline.data.sources import split_folders, splits
from pipeline.data.sources.base import Plan, Report, Skip
from pipeline.data.sources.files import FileSource, Rule
from pipeline.data.sources.tree import Classes, absolute, by_class, common_folder, list_tree, named_as_before
from pipeline.errors import PipelineError

FRACTIONS = {"train": 0.64, "val": 0.16, "test": 0.20}


class Folder(FileSource):
    """``splits``: a JSON file of class names a split; else the folders' own, if they are named train, val and test;
    else classes are drawn by ``seed`` and ``fractions``. A class of the dataset that is replaced keeps its split.

    ``grows``: classes and images come later. A class keeps its split and the shards that nothing new falls into stay as
    they are, so that an ingest again is equal to one from nothing and writes little.
    """

    def __init__(
        self,
        path: str | None,
        shape: Sequence[int] = (3, 84, 84),
        encoding: str = "raw",
        splits: str | None = None,
        fractions: Mapping[str, float] | None = None,
        seed: int = 0,
        rotations: Sequence[int] = (0,),
        keep_duplicates: bool = False,
        grows: bool = False,
        max_pixels: int = MAX_PIXELS,
        min_images: int = 1,
        same_names: bool = False,
    ) -> None:
        super().__init__(path, "a folder, or a zip archive, with one folder a class")
        self.rule = Rule.asked(shape, encoding, min_images, max_pixels)
        if not rotations or any(angle % 90 for angle in rotations):
            raise PipelineError(f"data.source.rotations={list(rotations)} are not multiples of 90")
        if len({angle % 360 for angle in rotations}) < len(rotations):
            raise PipelineError(f"data.source.rotations={list(rotations)} have the same turn twice")
        if any(angle % 180 for angle in rotations) and shape[1] != shape[2]:
            raise PipelineError(f"data.source.rotations={list(rotations)} need square images, not {list(shape)}")
        self.encoding, self.keep_duplicates, self.grows = encoding, keep_duplicates, grows
        self.splits_file, self.fractions, self.seed = splits, dict(fractions or FRACTIONS), seed
        self.rotations, self.min_images, self.same_names = tuple(rotations), min_images, same_names

    def plan(self, chunk_rows: int, report: Report) -> Plan:
        entries, skipped, shared = self._classes()
        if not entries:
            raise PipelineError(f"data.source.path={self.given} holds no folders with files: one a class is needed")
        given = None
        if self.splits_file is not None:
            given = splits.from_file(absolute(self.splits_file))
            splits.require(given, set(entries), self.given)
            splits.refuse_moves(given, self.kept, f"data.source.splits={self.splits_file}")
        elif not self.kept.keys() & entries.keys():  # else the folders' names are part of the classes' already
            where = f"data.source.path={self.given}"
            entries, given = split_folders.recognise(entries, where, self.same_names, report)
            splits.refuse_moves(given or {}, self.kept, where)
        if given is None:
            entries = named_as_before(entries, self.kept, shared)
        large = self.without_small(entries, skipped)
        classes = sorted(large)
        if given is None:
            drawn_by = splits.by_name if self.grows else splits.by_fractions
            chosen = splits.keep(drawn_by(classes, self.fractions, self.seed), classes, self.kept, report)
        else:
            chosen = {split: [name for name in names if name in large] for split, names in given.items()}
        if not self.same_names:
            split_folders.refuse_same_names(chosen)
        members = {name for names in chosen.values() for name in names}
        for name in classes:
            if name not in members:
                skipped += [Skip(entry.name, name, "not_in_split") for entry in entries[name]]
        about = {"kind": "folder", "seed": self.seed, "splits": self.splits_file or self.fractions}
        plan = self.plan_files(entries, chosen, chunk_rows, skipped, **about)
        plan.rotations = self.rotations
        return plan

    def _classes(self) -> tuple[Classes, list[Skip], str]:
        """Files by class, those that are of none, and the folders that the names of all classes are given without."""
        listed, skipped = list_tree(self.path)
        loose = [entry for entry in listed if "/" not in entry.name]
        skipped += [Skip(entry.name, "", "no_class", "lies in no class folder") for entry in loose]
        listed = [entry for entry in listed if "/" in entry.name]
        prefix = common_folder(entry.name for entry in listed)
        return by_class(listed, slice(prefix.count("/"), -1)), skipped, prefix
