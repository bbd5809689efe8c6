"""Arrow IPC shards: written whole, memory-mapped, checked by their SHA-256.

A raw shard is one record batch with one column ``image`` of fixed-shape ``uint8`` tensors [C, H, W], so that the
mapped file is the array; one of features has ``float32`` [D, 1, 1]. An encoded shard has a column of image files (PNG,
JPEG, WebP) as bytes.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.data.manifest import FEATURES
from pipeline.errors import PipelineError

COLUMN = "image"


def shard_name(digest: str) -> str:
    """Named by its content, so that a new version of a dataset never overwrites a shard of the old one."""
    return f"shard-{digest[:16]}.arrow"


def is_shard(name: str) -> bool:
    return name.startswith("shard-") and name.endswith(".arrow")


def raw_table(images: np.ndarray) -> pa.Table:
    """Images uint8 [N, C, H, W], or features float32 [N, D, 1, 1], as a one-column table, without a copy."""
    images = np.ascontiguousarray(images, dtype=None if images.dtype == np.float32 else np.uint8)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
    return pa.table({COLUMN: tensors})


def encoded_table(files: Sequence[bytes]) -> pa.Table:
    return pa.table({COLUMN: pa.array(files, type=pa.large_binary())})


def shard_bytes(table: pa.Table) -> pa.Buffer:
    """The shard's file content: equal tables give equal bytes."""
    table = table.combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, table.num_rows))
    return sink.getvalue()


def map_shard(path: str, shape: tuple[int, int, int], rows: int, encoding: str) -> np.ndarray | pa.Array:
    """Map a local shard: uint8 [rows, C, H, W] when raw, float32 of features, an Arrow array of bytes when encoded."""
    try:
        with pa.memory_map(path) as source:
            column = pa.ipc.open_file(source).read_all().column(COLUMN)
        chunk = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        if len(chunk) != rows:
            raise PipelineError(f"shard {path} holds {len(chunk)} rows, not {rows}; fetch or ingest the dataset again")
        if encoding == "encoded":
            if not pa.types.is_large_binary(chunk.type):
                raise PipelineError(f"shard {path} holds {chunk.type}, not image files; ingest the dataset again")
            return chunk
        view = chunk.to_numpy_ndarray()
        wanted = np.float32 if encoding == FEATURES else np.uint8
        if view.dtype != wanted or view.shape[1:] != shape:
            raise PipelineError(f"shard {path} holds {view.dtype} {view.shape[1:]}, not {np.dtype(wanted)} {shape}")
        return view
    except (pa.ArrowException, NotImplementedError, KeyError, AttributeError, OSError) as error:
        raise PipelineError(f"shard {path} is not a readable Arrow file ({error}); ingest the dataset again") from error
