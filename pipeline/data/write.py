"""Writing datasets: shards first, the manifest last, and nothing in between that looks like a dataset."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import store
from pipeline.data import png, shards
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

    def write_file(self, name: str, content: bytes) -> None:
        store.write_bytes(store.join(self.place, name), content)

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
                self.write_file(name, content)
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
            _remove_shards(self.uri, {shard.file for shard in written} - _known_shards(self.uri))

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


class DatasetWriter:
    """Writes classes, one after the other, as a dataset; use as a context manager and end with ``finish``.

    Rows are packed into shards of about ``shard_bytes``, whatever the sizes in which they arrive: at most one shard
    is held in memory. Leaving the context without ``finish`` removes everything.
    """

    def __init__(
        self,
        uri: str,
        name: str,
        shape: tuple[int, int, int],
        encoding: str = "raw",
        shard_bytes: int = SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        self.name, self.shape, self.encoding, self.shard_bytes = name, shape, encoding, shard_bytes
        self.counts: dict[str, int] = {}
        self._target = Target(uri, overwrite)
        self._moments: dict[str, Moments] = {}
        self._pending: list[Any] = []  # arrays of rows when raw, files as bytes when encoded
        self._pending_rows = self._pending_bytes = 0
        self._shards: list[ShardInfo] = []
        self._finished = False

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._finished:
            self._target.abort(self._shards)

    def add(self, name: str, rows: np.ndarray | Sequence[bytes]) -> None:
        """Append images to class ``name``: uint8 [n, C, H, W] when raw, image files as bytes when encoded.

        A class may arrive in several consecutive parts.
        """
        if name in self.counts and name != next(reversed(self.counts)):
            raise ValueError(f"class {name!r} was finished before; its images must follow each other")
        pixels = self._pixels(name, rows)
        self.counts[name] = self.counts.get(name, 0) + len(rows)
        self._moments[name] = self._moments.get(name, Moments.zero(self.shape[0])) + Moments.of(pixels)
        if self.encoding == "raw":
            self._add_raw(pixels)
        else:
            for content in rows:
                self._pending.append(content)
                self._pending_rows += 1
                self._pending_bytes += len(content)
                if self._pending_bytes >= self.shard_bytes:
                    self._flush()

    def finish(
        self,
        splits: Mapping[str, Sequence[str]],
        rotations: Sequence[int] = (0,),
        source: Mapping[str, Any] | None = None,
        skipped: Mapping[str, int] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Manifest:
        """Write the manifest, which makes it a dataset. ``splits`` lists the class names of every split."""
        self._flush()
        manifest = make_manifest(
            self.name, self.shape, self.encoding, self.counts, splits, self._moments, self._shards,
            rotations, source or {}, skipped or {},
        )  # fmt: skip
        self._target.commit(manifest, files)
        self._finished = True
        return manifest

    def _pixels(self, name: str, rows: np.ndarray | Sequence[bytes]) -> np.ndarray:
        if self.encoding == "raw":
            pixels = np.asarray(rows)
        else:
            pixels = np.stack([png.decode(content, self.shape) for content in rows])
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self.shape:
            raise PipelineError(
                f"images of class {name!r} are {pixels.dtype} {list(pixels.shape[1:])}, not uint8 {list(self.shape)}"
            )
        return pixels

    def _add_raw(self, pixels: np.ndarray) -> None:
        capacity = rows_per_shard(self.shape, self.shard_bytes)
        while len(pixels):
            part = pixels[: capacity - self._pending_rows]
            self._pending.append(part)
            self._pending_rows += len(part)
            pixels = pixels[len(part) :]
            if self._pending_rows == capacity:
                self._flush()

    def _flush(self) -> None:
        if not self._pending_rows:
            return
        raw = self.encoding == "raw"
        table = shards.raw_table(np.concatenate(self._pending)) if raw else shards.encoded_table(self._pending)
        self._shards.append(write_shard(self._target.place, table, self._target.current))
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0


def write_dataset(
    uri: str,
    name: str,
    classes: Iterable[tuple[str, np.ndarray | Sequence[bytes]]],
    splits: Mapping[str, Sequence[str]],
    rotations: Sequence[int] = (0,),
    shard_bytes: int = SHARD_BYTES,
    encoding: str = "raw",
    source: Mapping[str, Any] | None = None,
    skipped: Mapping[str, int] | None = None,
    shape: tuple[int, int, int] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write ``classes`` (name, uint8 [n, C, H, W] or image files as bytes) as a dataset at ``uri``.

    ``shape`` (C, H, W) is that of the first raw images unless given; encoded images need it.
    """
    writer: DatasetWriter | None = None
    try:
        for class_name, rows in classes:
            if writer is None:
                if shape is None:
                    if encoding != "raw":
                        raise ValueError("encoded images need their shape")
                    shape = np.asarray(rows).shape[1:]
                assert shape is not None
                writer = DatasetWriter(uri, name, shape, encoding, shard_bytes, overwrite)
            writer.add(class_name, rows)
        if writer is None:
            raise PipelineError(f"dataset {name!r} has no classes: nothing to write")
        return writer.finish(splits, rotations, source, skipped)
    finally:
        if writer is not None:
            writer.__exit__()


class Moments:
    """Exact sums over pixels, so that mean and std depend neither on order nor on the machine."""

    def __init__(self, pixels: int, total: Sequence[int], squares: Sequence[int]) -> None:
        self.pixels = pixels  # per channel
        self.total = [int(value) for value in total]
        self.squares = [int(value) for value in squares]

    @classmethod
    def zero(cls, channels: int) -> Moments:
        return cls(0, [0] * channels, [0] * channels)

    @classmethod
    def of(cls, images: np.ndarray) -> Moments:
        """Sums of images uint8 [N, C, H, W]."""
        rows, channels, height, width = images.shape
        totals, squares = row_sums(images)
        return cls(rows * height * width, totals.sum(axis=0), squares.sum(axis=0))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.pixels + other.pixels,
            [a + b for a, b in zip(self.total, other.total, strict=True)],
            [a + b for a, b in zip(self.squares, other.squares, strict=True)],
        )

    @property
    def mean(self) -> list[float]:
        """Per channel, in units of 0..1."""
        return [total / (255 * self.pixels) for total in self.total]

    @property
    def std(self) -> list[float]:
        """Population standard deviation per channel, in units of 0..1: sqrt(n Q - S^2) / (255 n), in integers."""
        n = self.pixels
        return [math.sqrt(n * q - s * s) / (255 * n) for s, q in zip(self.total, self.squares, strict=True)]


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


def rows_per_shard(shape: tuple[int, int, int], shard_bytes: int) -> int:
    return max(1, shard_bytes // math.prod(shape))


def write_shard(place: str, table: pa.Table, current: str | None = None) -> ShardInfo:
    """Write a shard to ``place``, unless the dataset at ``current`` has it, undamaged."""
    content = shards.shard_bytes(table)
    digest = sha256(content)
    name = shards.shard_name(digest)
    if current is None or not _has(store.join(current, name), digest):
        store.write_bytes(store.join(place, name), content)
    return ShardInfo(name, table.num_rows, content.size, digest)


def _has(uri: str, digest: str) -> bool:
    return store.exists(uri) and sha256(store.read_bytes(uri)) == digest


def make_manifest(
    name: str,
    shape: tuple[int, int, int],
    encoding: str,
    counts: Mapping[str, int],
    splits: Mapping[str, Sequence[str]],
    moments: Mapping[str, Moments],
    written: Sequence[ShardInfo],
    rotations: Sequence[int],
    source: Mapping[str, Any],
    skipped: Mapping[str, int],
) -> Manifest:
    """The manifest of classes (name -> rows, in the order of their rows) with the statistics of the train split."""
    number = {class_name: index for index, class_name in enumerate(counts)}
    for split, members in splits.items():
        for member in members:
            if member not in number:
                raise PipelineError(f"split {split!r} of dataset {name!r} names class {member!r}, which has no images")
    measured = Moments.zero(shape[0])
    for member in splits.get("train", list(counts)):
        measured = measured + moments[member]
    return Manifest(
        name=name,
        shape=(int(shape[0]), int(shape[1]), int(shape[2])),
        encoding=encoding,
        class_names=list(counts),
        class_counts=list(counts.values()),
        splits={split: [number[member] for member in members] for split, members in splits.items()},
        mean=measured.mean if measured.pixels else [0.0] * shape[0],
        std=measured.std if measured.pixels else [1.0] * shape[0],
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


def _is_shard(name: str) -> bool:
    return name.startswith("shard-") and name.endswith(".arrow")


def _known_shards(uri: str) -> set[str]:
    where = store.join(uri, MANIFEST_NAME)
    if not store.exists(where):
        return set()
    return {shard.file for shard in Manifest.from_json(store.read_bytes(where).decode(), where).shards}


def _remove_other_shards(uri: str, manifest: Manifest) -> None:
    """Remove shards of an older version, of a killed writer, or of an ingest that wrote them again."""
    current = {shard.file for shard in manifest.shards}
    _remove_shards(uri, {name for name in store.list_names(uri) if _is_shard(name)} - current)


def _remove_shards(uri: str, names: Iterable[str]) -> None:
    fs, path = store.open_store(uri)
    for name in names:
        fs.delete_file(f"{path}/{name}")
