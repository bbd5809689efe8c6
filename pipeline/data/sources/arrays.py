"""Sources whose images are arrays in one archive: rows are sorted by class and handed out in chunks."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.data.sources.base import Chunk


def chunks(images: np.ndarray, classes: np.ndarray, names: Sequence[str], chunk_rows: int) -> Iterator[Chunk]:
    """Chunks of ``images`` uint8 [N, C, H, W] in the order of classes [N], then of names [N]."""
    order = sorted(range(len(names)), key=lambda row: (classes[row], names[row]))
    for start in range(0, len(order), chunk_rows):
        rows = order[start : start + chunk_rows]
        part = np.ascontiguousarray(images[rows])
        yield Chunk(part, classes[rows].astype(np.int32), [names[row] for row in rows], content_digests(part))


def content_digests(images: np.ndarray) -> list[bytes]:
    """A digest of every image of uint8 [N, C, H, W]."""
    return [hashlib.blake2b(image.data, digest_size=16).digest() for image in images]
