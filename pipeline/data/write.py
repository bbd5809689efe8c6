"""Writing datasets: shards first, the manifest last, and nothing in between that looks like a dataset."""

import fcntl
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa

from pipeline import store
from pipeline.data import shards
from pipeline.data.dataset import read_manifest
from pipeline.data.manifest import MANIFEST_NAME, Manifest, ShardInfo
from pipeline.errors import PipelineError
from pipeline.files import sha256

SHARD_BYTES = 64 * 2**20


class Target:
    """The place of a dataset that is being written, for one writer.

    A local dataset grows in a hidden sibling folder that is renamed when it is complete. In an object store, shards
    go to their final place and the manifest, which makes them a dataset, follows last. An existing dataset stays
    readable until the manifest of the new one replaces the old one; shard names carry their content, so that old and
    new shards never overwrite each other. What a killed writer left is removed by the next one, at its beginning or,
    where it goes on from that (``resume``), at its end.
    """

    def __init__(self, uri: str, overwrite: bool = False, resume: bool = False) -> None:
        self.uri = uri.rstrip("/")
        self.overwrite = overwrite
        self._refuse_existing()
        self._staging: Path | None = None
        self._lock: int | None = None
        store.refuse_missing_bucket(uri)
        if not store.is_remote(uri):
            self._final = Path(store.open_store(uri)[1])
            self._staging = self._final.parent / f".{self._final.name}.partial"
            if self._final.is_file():
                raise PipelineError(f"{uri} is a file; give another data.name or data.root")
            with store.writing(uri, "data.root"):
                self._lock = _lock(self._staging, empty=not resume)

    @property
    def place(self) -> str:
        """The folder or prefix that shards are written to."""
        return str(self._staging) if self._staging else self.uri

    @property
    def current(self) -> str | None:
        """The folder or prefix of the dataset that is replaced: its shards that do not change stay where they are."""
        return self.uri if store.exists(store.join(self.uri, MANIFEST_NAME)) else None

    def commit(self, manifest: Manifest, files: Mapping[str, bytes] | None = None) -> None:
        """Make the dataset visible; ``files`` (name -> content) are put beside the manifest, before it."""
        self._refuse_existing()
        present = {*store.list_names(self.place), *store.list_names(self.uri)}
        missing = {shard.file for shard in manifest.shards} - present
        if missing:
            raise PipelineError(f"shards of {self.uri} vanished while it was written ({sorted(missing)[0]}); run again")
        if self._staging is None or self._final.exists():
            self._replace(manifest, files or {})
        else:
            for name, content in {**(files or {}), MANIFEST_NAME: manifest.to_json().encode()}.items():
                store.write_bytes(store.join(self.place, name), content)
            _remove_other_shards(self.place, manifest)
            self._staging.rename(self._final)
        self.leave()
        self._staging = None

    def abort(self, written: Sequence[ShardInfo] = ()) -> None:
        """Remove what was written so far."""
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            self.leave()
        elif store.is_remote(self.uri):
            kept = read_manifest(self.uri).shards if self.current else []
            store.remove_files(self.uri, {shard.file for shard in written} - {shard.file for shard in kept})

    def _replace(self, manifest: Manifest, files: Mapping[str, bytes]) -> None:
        if self._staging is not None:
            for name in {shard.file for shard in manifest.shards} & set(store.list_names(self.place)):
                os.replace(self._staging / name, self._final / name)
        for name, content in {**files, MANIFEST_NAME: manifest.to_json().encode()}.items():
            where = store.join(self.uri, name)
            if not store.exists(where) or store.read_bytes(where) != content:
                store.write_bytes(where, content)
        _remove_other_shards(self.uri, manifest)
        if self._staging is not None:
            shutil.rmtree(self._staging)

    def _refuse_existing(self) -> None:
        if not self.overwrite and store.exists(store.join(self.uri, MANIFEST_NAME)):
            raise PipelineError(f"there is a dataset at {self.uri} already; add overwrite=true to replace it")

    def leave(self) -> None:
        """Let another writer in; what was written stays for it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def write_dataset(
    uri: str,
    name: str,
    classes: Iterable[tuple[str, np.ndarray]],
    splits: Mapping[str, Sequence[str]],
    rotations: Sequence[int] = (0,),
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Manifest:
    """Write ``classes`` (name, uint8 [n, C, H, W]) as a dataset at ``uri``, in this process.

    A class may arrive in several consecutive parts. Rows are packed into shards of about ``shard_bytes``, whatever the
    sizes in which they arrive: at most one shard is held in memory. What fails leaves nothing.
    """
    remaining = iter(classes)
    first = next(remaining, None)
    if first is None:
        raise PipelineError(f"dataset {name!r} has no classes: nothing to write")
    shape = np.asarray(first[1]).shape[1:]
    names: list[str] = []
    sums: list[tuple[np.ndarray, ...]] = []  # of every part: the number of its class, and those of its rows' pixels

    def parts() -> Iterator[np.ndarray]:
        for class_name, rows in chain([first], remaining):
            images = np.asarray(rows)
            if images.dtype != np.uint8 or images.shape[1:] != shape:
                raise PipelineError(
                    f"images of class {class_name!r} are {images.dtype} {list(images.shape[1:])}, "
                    f"not uint8 {list(shape)}"
                )
            if not names or class_name != names[-1]:
                if class_name in names:
                    raise ValueError(f"class {class_name!r} was finished before; its images must follow each other")
                names.append(class_name)
            sums.append((np.full(len(images), len(names) - 1), *row_sums(images)))
            yield images

    target, written = Target(uri, overwrite), list[ShardInfo]()
    try:
        for images in _repacked(parts(), rows_per_shard(shape, shard_bytes)):
            written.append(write_shard(target.place, shards.raw_table(images), target.current))
        of_classes = ClassSums.of(len(names), *map(np.concatenate, zip(*sums, strict=True)))
        manifest = make_manifest(name, shape, "raw", names, of_classes, splits, written, rotations, {}, {})
        target.commit(manifest)
    except BaseException:
        target.abort(written)
        raise
    return manifest


def _repacked(parts: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The rows of all ``parts`` in arrays of ``rows`` rows each; the last one may be shorter."""
    held: list[np.ndarray] = []
    for part in parts:
        while len(part):
            taken = part[: rows - sum(map(len, held))]
            held.append(taken)
            part = part[len(taken) :]
            if sum(map(len, held)) == rows:
                yield np.concatenate(held)
                held = []
    if held:
        yield np.concatenate(held)


class ClassSums(NamedTuple):
    """How many rows every class has, and exact sums over their pixels: mean and std depend neither on the order of the
    rows nor on the machine."""

    counts: np.ndarray  # [classes] int64
    totals: np.ndarray  # [classes, C] int64: sums of pixels
    squares: np.ndarray  # [classes, C] int64: sums of their squares

    @classmethod
    def of(cls, classes: int, numbers: np.ndarray, totals: np.ndarray, squares: np.ndarray) -> Self:
        """From the class numbers [N] of rows and what :func:`row_sums` gives for them."""
        sums = cls(np.bincount(numbers, minlength=classes), *np.zeros((2, classes, totals.shape[1]), dtype=np.int64))
        np.add.at(sums.totals, numbers, totals)
        np.add.at(sums.squares, numbers, squares)
        return sums

    def mean_and_std(self, members: Sequence[int], area: int) -> tuple[list[float], list[float]]:
        """Per channel over the classes ``members`` of images of ``area`` pixels, in units of 0..1.

        The population's standard deviation: sqrt(n Q - S^2) / (255 n), in integers that have no limit.
        """
        n = area * sum(self.counts[members].tolist())
        if not n:
            return [0.0] * self.totals.shape[1], [1.0] * self.totals.shape[1]
        totals, squares = (list(map(sum, zip(*sums[members].tolist(), strict=True))) for sums in self[1:])
        std = [math.sqrt(n * q - s * s) / (255 * n) for s, q in zip(totals, squares, strict=True)]
        return [total / (255 * n) for total in totals], std


def row_sums(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums and sums of squares of images uint8 [N, C, H, W], each int64 [N, C]."""
    flat = images.reshape(*images.shape[:2], -1)
    totals, squares = (np.empty(flat.shape[:2], dtype=np.int64) for _ in range(2))
    step = max(1, 2**17 // max(1, math.prod(flat.shape[1:])))  # parts that stay in the cache
    for start in range(0, len(flat), step):
        part = flat[start : start + step].astype(np.float64)  # sums of these integers are exact below 2^53
        totals[start : start + step] = np.vecdot(part, np.ones(part.shape[2]))
        squares[start : start + step] = np.vecdot(part, part)
    return totals, squares


def rows_per_shard(shape: Sequence[int], shard_bytes: int) -> int:
    return max(1, shard_bytes // math.prod(shape))


def write_shard(place: str, table: pa.Table, current: str | None = None) -> ShardInfo:
    """Write a shard to ``place``, unless the dataset at ``current`` has it, undamaged."""
    content = shards.shard_bytes(table)
    digest = sha256(content)
    name = shards.shard_name(digest)
    if current is None or not is_whole(store.join(current, name), digest):
        store.write_bytes(store.join(place, name), content)
    return ShardInfo(name, table.num_rows, content.size, digest)


def is_whole(uri: str, digest: str) -> bool:
    """Whether a shard is there, and is what was written."""
    return store.exists(uri) and sha256(store.read_bytes(uri)) == digest


def make_manifest(
    name: str,
    shape: Sequence[int],
    encoding: str,
    classes: Sequence[str],
    sums: ClassSums,
    splits: Mapping[str, Sequence[str]],
    written: Sequence[ShardInfo],
    rotations: Sequence[int],
    source: Mapping[str, Any],
    skipped: Mapping[str, int],
) -> Manifest:
    """The manifest of ``classes``, in the order of their rows, with the statistics of the train split.

    Classes without rows are left out.
    """
    present = np.flatnonzero(sums.counts).tolist()
    number = {classes[place]: index for index, place in enumerate(present)}
    for split, members in splits.items():
        for member in members:
            if member not in number:
                raise PipelineError(f"split {split!r} of dataset {name!r} names class {member!r}, which has no images")
    trained = [present[number[member]] for member in splits.get("train", list(number))]
    channels, height, width = map(int, shape)
    mean, std = sums.mean_and_std(trained, height * width)
    return Manifest(
        name=name,
        shape=(channels, height, width),
        encoding=encoding,
        class_names=list(number),
        class_counts=sums.counts[present].tolist(),
        splits={split: [number[member] for member in members] for split, members in splits.items()},
        mean=mean,
        std=std,
        shards=list(written),
        rotations=list(rotations),
        source=dict(source),
        skipped=dict(skipped),
    )


def _lock(folder: Path, empty: bool) -> int:
    """Make ``folder``, or ``empty`` what a killed writer left there, and lock it; the lock dies with this process."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise PipelineError(f"{folder} is being written by another process; wait for it or stop it") from error
        if folder.exists() and os.path.samestat(os.fstat(lock), folder.stat()):
            break
        os.close(lock)  # its writer finished and renamed it in between
    for path in folder.iterdir() if empty else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return lock


def _remove_other_shards(uri: str, manifest: Manifest) -> None:
    """Remove shards of an older version, of a killed writer, or of an ingest that wrote them again."""
    current = {shard.file for shard in manifest.shards}
    store.remove_files(uri, set(filter(shards.is_shard, store.list_names(uri))) - current)
