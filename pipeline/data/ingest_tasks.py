"""What the tasks of an ingest do: orders to chunks, chunks to shards, shards without their duplicates."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import store
from pipeline.data import shards
from pipeline.data.manifest import ShardInfo
from pipeline.data.sources.base import Chunk, Shape, Skip, Source
from pipeline.data.sources.files import MOST
from pipeline.data.write import row_sums, rows_per_shard, write_shard
from pipeline.errors import PipelineError

CHUNK_ROWS = 1024  # at most: a task of a second or less
CHUNKS_A_SHARD = 16  # at least: shards of large images are read by many tasks too


@dataclass(frozen=True)
class Layout:
    """How images make shards: a shard is ``chunks`` consecutive chunks of at most ``chunk_rows`` images.

    Of a source that grows it is an order of its plan, of ``order_rows`` images on average.
    """

    shape: Shape
    encoding: str
    chunk_rows: int
    chunks: int
    order_rows: int

    @classmethod
    def of(cls, source: Source, shard_bytes: int) -> Layout:
        rows = rows_per_shard(source.shape, shard_bytes)
        chunk_rows = max(1, min(CHUNK_ROWS, rows // CHUNKS_A_SHARD))
        order_rows = max(1, rows // MOST) if source.grows else chunk_rows
        return cls(source.shape, source.encoding, chunk_rows, max(1, rows // chunk_rows), order_rows)


@dataclass(frozen=True)
class Rows:
    """What the driver keeps of images that it never sees."""

    classes: np.ndarray  # int32 [n], positions in the plan's classes
    names: list[str]
    digests: list[bytes]
    totals: np.ndarray  # int64 [n, C]: sums of pixels
    squares: np.ndarray  # int64 [n, C]: sums of their squares
    skipped: list[Skip]

    @classmethod
    def of(cls, chunk: Chunk) -> Rows:
        return cls(chunk.classes, chunk.names, chunk.digests, *row_sums(chunk.images), chunk.skipped)

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        return cls(
            np.concatenate([part.classes for part in parts]),
            [name for part in parts for name in part.names],
            [digest for part in parts for digest in part.digests],
            np.concatenate([part.totals for part in parts]),
            np.concatenate([part.squares for part in parts]),
            [skip for part in parts for skip in part.skipped],
        )

    def where(self, stays: np.ndarray) -> Rows:
        """The rows that stay: bool [n]."""
        kept = np.flatnonzero(stays).tolist()
        names, digests = [self.names[row] for row in kept], [self.digests[row] for row in kept]
        return Rows(self.classes[kept], names, digests, self.totals[kept], self.squares[kept], self.skipped)


@dataclass(frozen=True)
class Written:
    """One shard; none when every image of its chunks was left out."""

    shard: ShardInfo | None
    rows: Rows
    chunks: list[tuple[int, int]]  # order and chunk within the order, to check that none is lost or out of place


def read_order(batch: dict[str, np.ndarray], source: Source, chunk_rows: int) -> Iterator[pa.Table]:
    """Ray Data map: one work order to one row a chunk. What is refused travels as text, so that it ends in one line."""
    number, order = int(batch["number"][0]), pickle.loads(batch["order"][0])
    try:
        for position, chunk in enumerate(source.read(order, chunk_rows)):
            about = {"chunk": (number, position), "rows": Rows.of(chunk), "lengths": None}
            pixels: Any = chunk.images.reshape(-1)
            if chunk.files is not None:
                about["lengths"] = [len(content) for content in chunk.files]
                pixels = b"".join(chunk.files)
            yield _row(pickle.dumps(about), pixels)
    except PipelineError as error:
        yield _row(pickle.dumps({"refused": str(error)}), b"")


def write_order(
    batch: dict[str, np.ndarray], source: Source, layout: Layout, place: str, current: str | None
) -> dict[str, list[bytes]]:
    """Ray Data map: one work order, which is a whole shard, to that shard."""
    return write_chunks(pa.concat_tables(read_order(batch, source, layout.chunk_rows)), layout, place, current)


def write_chunks(table: pa.Table, layout: Layout, place: str, current: str | None) -> dict[str, list[bytes]]:
    """Ray Data map: the chunks of one shard to that shard; returns a pickled Written, or the text of a refusal."""
    abouts = [pickle.loads(about.as_py()) for about in table.column("about")]
    for about in abouts:
        if "refused" in about:
            return {"written": [pickle.dumps(about["refused"])]}
    rows = Rows.join([about["rows"] for about in abouts])
    buffers = [scalar.as_buffer() for scalar in table.column("pixels")]
    table = _shard_table(buffers, abouts, layout) if rows.names else None
    return _written(place, table, rows, [about["chunk"] for about in abouts], current)


def rewrite(batch: dict[str, np.ndarray], layout: Layout, place: str, current: str | None) -> dict[str, list[bytes]]:
    """Ray Data map: a shard and which of its rows stay, bool [rows], to a shard of those."""
    written, stays = pickle.loads(batch["work"][0])
    where = store.join(place, written.shard.file)
    if current is not None and not store.exists(where):  # it was there before
        where = store.join(current, written.shard.file)
    table = pa.ipc.open_file(io.BytesIO(store.read_bytes(where))).read_all()
    if layout.encoding == "raw":
        images = table.column(shards.COLUMN).combine_chunks()
        table = shards.raw_table(images.to_numpy_ndarray()[stays])
    else:
        table = table.filter(pa.array(stays))
    return _written(place, table if stays.any() else None, written.rows.where(stays), written.chunks, current)


def _written(
    place: str, table: pa.Table | None, rows: Rows, chunks: list[tuple[int, int]], current: str | None
) -> dict[str, list[bytes]]:
    """A shard, written and pickled as Written; a full disk travels as text, so that it ends in one line."""
    try:
        with store.writing(place, "data.root"):
            shard = write_shard(place, table, current) if table is not None else None
    except PipelineError as error:
        return {"written": [pickle.dumps(str(error))]}
    return {"written": [pickle.dumps(Written(shard, rows, chunks))]}


def _row(about: bytes, pixels: Any) -> pa.Table:
    """A table of one row; the pixels are not copied."""
    buffer = pa.py_buffer(pixels)
    ends = pa.py_buffer(np.asarray([0, buffer.size], dtype=np.int64))
    column = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, buffer])
    return pa.table({"about": pa.array([about], type=pa.large_binary()), "pixels": column})


def _shard_table(buffers: list[pa.Buffer], abouts: list[dict[str, Any]], layout: Layout) -> pa.Table:
    if layout.encoding == "raw":
        images = [np.frombuffer(buffer, dtype=np.uint8).reshape(-1, *layout.shape) for buffer in buffers]
        return shards.raw_table(np.concatenate(images))
    files: list[bytes] = []
    for buffer, about in zip(buffers, abouts, strict=True):
        start = 0
        for length in about["lengths"]:
            files.append(buffer.slice(start, length).to_pybytes())
            start += length
    return shards.encoded_table(files)
