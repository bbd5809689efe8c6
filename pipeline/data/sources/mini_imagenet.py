"""mini-ImageNet: 100 classes of ImageNet, 600 images each, in the split of Ravi and Larochelle (2017), at 84 x 84.

Images of another size are cut to their central square and resized bilinearly with antialiasing (as TADAM does).
ImageNet's license forbids passing the images on: they are read from where the user has them, in any of the layouts
that are in use:

  class folders   .../nXXXXXXXX/*.jpg, at any depth, in a folder or a zip archive
  images + csv    images/*.jpg with train.csv, val.csv and test.csv (columns filename, label)
  cached          mini-imagenet-cache-train.pkl, -val.pkl and -test.pkl, read without executing them
"""

import csv
import io
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np

from pipeline.data.sources import splits
from pipeline.data.sources.arrays import chunks
from pipeline.data.sources.base import Chunk, Plan, Report, Skip
from pipeline.data.sources.files import FileSource, Rule, Unusable, content_of
from pipeline.data.sources.tree import Classes, Entry, folder_of, grouped, list_tree
from pipeline.data.sources.unpickle import read_arrays
from pipeline.errors import PipelineError

CACHED = "mini-imagenet-cache-{}.pkl"
PARTS = ("train", "val", "test")
_WORDNET = re.compile(r"^n\d{8}$")


class MiniImagenet(FileSource):
    """``path``: a folder, or a zip archive, in one of the three layouts."""

    rule = Rule(shape=(3, 84, 84))

    def __init__(self, path: str | None) -> None:
        folders = f"class folders nXXXXXXXX, with images/ and train.csv, or with {CACHED.format('train')}"
        super().__init__(path, f"a folder with {folders}")

    def plan(self, chunk_rows: int, report: Report) -> Plan:
        chosen = splits.published("mini_imagenet_ravi")
        cached = [os.path.join(self.path, CACHED.format(part)) for part in PARTS]
        if os.path.exists(cached[0]):
            missing = [path for path in cached if not os.path.isfile(path)]
            if missing:
                raise PipelineError(f"there is no {missing[0]}: all three cached archives are needed")
            return _cached_plan(cached, chosen, {"kind": "mini_imagenet", "path": self.given})
        listed, skipped = list_tree(self.path)
        tables = [entry for entry in listed if entry.name.split("/")[-1] in {f"{part}.csv" for part in PARTS}]
        if tables:
            entries, others = _by_tables(listed, tables)
        else:
            entries, others = grouped(listed, _class_of, "no_class", "does not lie in a folder nXXXXXXXX")
        splits.require(chosen, set(entries), self.given)
        return self.plan_files(entries, chosen, chunk_rows, skipped + others, kind="mini_imagenet")

    def read(self, order: Any, chunk_rows: int) -> Iterator[Chunk]:
        """An order is a list of files, or a cached archive with its classes."""
        return super().read(order, chunk_rows) if isinstance(order, list) else _read_cached(order, chunk_rows)


def _class_of(name: str) -> str | None:
    folder = folder_of(name).rpartition("/")[2]
    return folder if _WORDNET.match(folder) else None


def _by_tables(listed: list[Entry], tables: list[Entry]) -> tuple[Classes, list[Skip]]:
    """Files as the tables label them; a labelled file that is not there is an image that is missing."""
    files = {entry.name.split("/")[-1]: entry for entry in listed if entry not in tables}
    found: Classes = {}
    skipped = []
    for table in tables:
        reader = csv.DictReader(io.StringIO(_text(table), newline=""))
        if not reader.fieldnames or not {"filename", "label"} <= set(reader.fieldnames):
            raise PipelineError(f"{table.name} has no columns filename and label")
        for row in reader:
            name, label = row["filename"], row["label"]
            if name in files:
                found.setdefault(label, []).append(files.pop(name))
            else:
                skipped.append(Skip(name, label, "missing", f"is in {table.name} but not in the folder"))
    skipped += [Skip(entry.name, "", "not_in_split", "no table names it") for entry in files.values()]
    return {name: sorted(entries) for name, entries in found.items()}, skipped


def _text(table: Entry) -> str:
    try:
        with ExitStack() as stack:
            return content_of(table, {}, stack).decode("utf-8-sig")
    except Unusable as error:
        raise PipelineError(f"{table.name} is {error.reason} {error.detail}".strip() + "; fetch it again") from error
    except UnicodeDecodeError as error:
        raise PipelineError(f"{table.name} is no UTF-8 text ({error.reason}); save it as such") from error


def _cached_plan(cached: list[str], chosen: splits.Splits, source: dict[str, Any]) -> Plan:
    """Classes in the order of the archives, because each is read once, from beginning to end."""
    parts = [sorted(chosen[part]) for part in PARTS]
    classes = [name for names in parts for name in names]
    orders = [(path, classes.index(names[0]), names) for path, names in zip(cached, parts, strict=True)]
    return Plan(classes, chosen, orders, {**source, "layout": "cached"}, archives=cached)


def _read_cached(order: tuple[str, int, list[str]], chunk_rows: int) -> Iterator[Chunk]:
    path, first, classes = order
    with open(path, "rb") as stream:
        content = read_arrays(stream, path)
    try:
        images, members = np.asarray(content["image_data"]), dict(content["class_dict"])
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (84, 84, 3):
            raise ValueError(f"image_data is {images.dtype} {images.shape}, not uint8 [N, 84, 84, 3]")
        if sorted(members) != classes:
            raise ValueError("its classes are not those of the split")
        rows = np.concatenate([np.asarray(members[name], dtype=np.int64) for name in classes])
        labels = np.repeat(np.arange(len(classes)) + first, [len(members[name]) for name in classes])
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(images):
            raise ValueError("class_dict names rows that are not there")
    except (KeyError, TypeError, ValueError) as error:
        raise PipelineError(f"{path} is no cached archive of mini-ImageNet ({error})") from error
    names = [f"{classes[label - first]}/{row:06d}" for label, row in zip(labels, rows, strict=True)]
    yield from chunks(images[rows].transpose(0, 3, 1, 2), labels, names, chunk_rows)
