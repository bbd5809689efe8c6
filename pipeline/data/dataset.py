"""A dataset as its readers see it: rows of pixels behind a memory map, classes as ranges of rows."""

import fcntl
import functools
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline import store
from pipeline.commands import command, data_root
from pipeline.data import images, png, shards
from pipeline.data.manifest import MANIFEST_NAME, Manifest
from pipeline.errors import PipelineError, some
from pipeline.files import file_sha256, sha256

ATTEMPTS = 3  # at copying a shard
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassTable:
    """The classes of one split as arrays, all that an episode needs to be drawn.

    Position p of the table is class ``ids[p]``, whose images are rows ``[starts[p], starts[p] + counts[p])``.
    """

    ids: np.ndarray  # [classes] int64: manifest class * R + rotation index
    starts: np.ndarray  # [classes] int64
    counts: np.ndarray  # [classes] int64
    split: str
    names: Sequence[str] = ()  # [classes] for messages

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def firsts(self) -> np.ndarray:
        """Number of the first image of every class, where images are numbered class by class: [classes] int64."""
        return np.cumsum(self.counts) - self.counts

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Positions of the classes ``ids``, in their shape."""
        sorter = self.ids.argsort(kind="stable")
        return sorter[np.searchsorted(self.ids, ids, sorter=sorter)]

    def images(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the classes and rows of the images ``numbers`` [N], numbered class by class."""
        position = np.searchsorted(np.cumsum(self.counts), numbers, side="right")
        return position, self.starts[position] + numbers - self.firsts[position]

    def too_small(self, least: int) -> str:
        """Which classes have fewer images than ``least``, for messages."""
        small = np.flatnonzero(self.counts < least).tolist() if self.names else []
        return some(list(dict.fromkeys(repr(self.names[place]) for place in small)))


def class_table(manifest: Manifest, split: str, holdout: str = "all", holdout_fraction: float = 0.0) -> ClassTable:
    """The classes of ``split`` ("train", or a union as "train+val"), each with its rotations.

    ``holdout`` chooses the rows of every class: "all", "kept" (all but the last ``holdout_fraction``) or "held"
    (the last ``holdout_fraction``), for classical training that keeps images of its own classes aside.
    """
    members: list[int] = []
    for part in (parts := split.split("+")):
        if parts.count(part) > 1:
            raise PipelineError(f"split {split!r} names {part!r} twice")
        if part not in manifest.splits:
            known = ", ".join(sorted(manifest.splits))
            raise PipelineError(f"dataset {manifest.name!r} has no split {part!r}; it has {known}")
        members += manifest.splits[part]
    table = _table(manifest, members, split)
    held = np.round(table.counts * holdout_fraction).astype(np.int64)
    if holdout == "kept":
        return replace(table, counts=table.counts - held)
    if holdout == "held":
        return replace(table, starts=table.starts + table.counts - held, counts=held)
    if holdout != "all":
        raise ValueError(f"holdout is {holdout!r}: one of all, kept, held")
    return table


def whole_table(manifest: Manifest) -> ClassTable:
    """All classes, whatever their split, in the order of their ids."""
    return _table(manifest, list(range(len(manifest.class_names))), "all")


def _table(manifest: Manifest, members: list[int], split: str) -> ClassTable:
    rotations = len(manifest.rotations)
    index = np.asarray(members, dtype=np.int64)
    starts, counts = manifest.class_starts[index], np.asarray(manifest.class_counts, dtype=np.int64)[index]
    ids = (index[:, None] * rotations + np.arange(rotations)).reshape(-1)
    names = [manifest.class_names[number] for number in members for _ in range(rotations)]
    return ClassTable(ids, np.repeat(starts, rotations), np.repeat(counts, rotations), split, names)


class Dataset:
    """Random access to the images of an ingested dataset, or to the features of one.

    Shards on a local disk are mapped where they lie. Shards in an object store are copied once to ``cache`` on this
    node, compared with the manifest's SHA-256, and mapped from there.

    ``shape`` [C, H, W] of the images that are given: by default that of the manifest; others are cut and resized as an
    image file is.
    """

    def __init__(
        self, uri: str, cache: str | None = None, verify: bool = True, shape: tuple[int, int, int] | None = None
    ) -> None:
        self.uri = uri
        self.manifest = read_manifest(uri)
        self.shape = shape or self.manifest.shape
        self._views = []
        for info in self.manifest.shards:
            if store.is_remote(uri):
                path = _fetch(uri, info.file, info.sha256, cache or default_cache(), self.manifest.fingerprint)
            else:
                path = os.path.join(store.open_store(uri)[1], info.file)
                if verify:
                    _check(path, info.sha256)
            self._views.append(shards.map_shard(path, self.manifest.shape, info.rows, self.manifest.encoding))
        rows = [info.rows for info in self.manifest.shards]
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)

    def gather(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Copy the images of ``rows`` int64 [N] to ``out`` uint8 [N, C, H, W], which is returned; features are float32.

        A buffer that is used again avoids the page faults that dominate a fresh one.
        """
        rows = np.ascontiguousarray(rows).reshape(-1)
        if out is None:
            out = np.empty((len(rows), *self.shape), dtype=self.manifest.dtype)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._starts[-1]:
            raise IndexError(f"rows {rows.min()}..{rows.max()} of a dataset of {self._starts[-1]}")
        if len(self._views) == 1:
            self._copy(0, rows, out)
            return out
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(shard):
            where = np.flatnonzero(shard == number)
            part = np.empty((len(where), *self.shape), dtype=self.manifest.dtype)
            out[where] = self._copy(number, rows[where] - self._starts[number], part)
        return out

    def _copy(self, number: int, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        view = self._views[number]
        raw = isinstance(view, np.ndarray)
        if raw and self.shape == self.manifest.shape:
            return np.take(view, rows, axis=0, out=out, mode="clip")
        for slot, row in enumerate(rows.tolist()):
            out[slot] = images.resized(view[row], self.shape) if raw else png.decode(view[row].as_py(), self.shape)
        return out


def check_shards(uri: str) -> None:
    """Compare the shards of a dataset on disk with its manifest, once in a process: before many tasks open them.

    Those of an object store are compared where they are copied to.

    Raises:
        PipelineError: one is missing or damaged.
    """
    if not store.is_remote(uri):
        _checked(uri, read_manifest(uri).fingerprint)


@functools.lru_cache(maxsize=64)
def _checked(uri: str, fingerprint: str) -> None:
    for info in read_manifest(uri).shards:
        _check(os.path.join(store.open_store(uri)[1], info.file), info.sha256)


def open_dataset(uri: str, shape: tuple[int, int, int] | None = None) -> Dataset:
    """A dataset that stays open in a process of the cluster; its shards were checked when the job began."""
    return _opened(uri, read_manifest(uri).fingerprint, shape)


@functools.lru_cache(maxsize=2)
def _opened(uri: str, fingerprint: str, shape: tuple[int, int, int] | None) -> Dataset:
    return Dataset(uri, verify=False, shape=shape)


def read_manifest(uri: str) -> Manifest:
    where = store.join(uri, MANIFEST_NAME)
    if not store.exists(where):
        store.refuse_missing_bucket(uri)
        moved = "if it was moved, give dataset= or data.root=, whichever the command has"
        raise PipelineError(f"no dataset at {uri}; {moved}; or make it with: {_ingest_of(uri)}")
    return Manifest.from_json(store.read_bytes(where).decode("utf-8", "replace"), where)


def _ingest_of(uri: str) -> str:
    """The command that makes a dataset of that name there."""
    root, _, name = uri.rstrip("/").rpartition("/")
    own = Path(__file__).parents[1] / "conf" / "data" / f"{name}.yaml"
    ready = name not in ("folder", "features") and own.is_file()
    source = [f"data={name}"] if ready else ["data=folder", f"data.name={name}", "data.source.path=FOLDER"]
    return command("ingest", *source, *data_root(root))


def default_cache() -> str:
    return os.environ.get("PIPELINE_CACHE", os.path.join(tempfile.gettempdir(), "pipeline-shards"))


def _check(path: str, expected: str) -> None:
    if not os.path.exists(path):
        raise PipelineError(f"shard {path} is missing; fetch or ingest the dataset again")
    if file_sha256(path) != expected:
        raise PipelineError(f"shard {path} is damaged (its SHA-256 is not the manifest's); ingest the dataset again")


def _fetch(uri: str, name: str, expected: str, cache: str, fingerprint: str) -> str:
    """Copy a shard to the node's cache, once for all processes of the node, and return its path."""
    folder = Path(cache) / fingerprint[:16]
    target = folder / name
    with store.writing(str(folder), "PIPELINE_CACHE"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / f"{name}.lock", "w")  # noqa: SIM115 (closed below)
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            if file_sha256(str(target)) == expected:
                return str(target)
            _logger.warning("shard %s is damaged in this node's cache; fetching it again", target)
            target.unlink()
        for _ in range(ATTEMPTS):  # a download can end early or be altered on its way: take it again
            content = store.read_bytes(store.join(uri, name))
            if sha256(content) == expected:
                store.write_bytes(str(target), content)
                return str(target)
            _logger.warning("shard %s: what arrived does not have the manifest's SHA-256; fetching it again", name)
    raise PipelineError(
        f"shard {store.join(uri, name)} is damaged: {ATTEMPTS} downloads did not give the manifest's SHA-256"
    )
