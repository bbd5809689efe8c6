"""Embed once: where a method sees an image through its backbone alone, no image of a split goes through it twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.augment import quarter_turns
from pipeline.data.batches import class_turns
from pipeline.data.dataset import ClassTable, Dataset
from pipeline.data.episodes import Plan
from pipeline.methods.base import Method
from pipeline.nets.norm import looks_at_the_batch
from pipeline.nets.pieces import in_pieces
from pipeline.nets.preprocess import Preprocess

IMAGES = 500  # embedded at once
MOST_BYTES = 2**30  # of a split's embeddings, which every evaluating process maps


@dataclass(frozen=True)
class Embeddings:
    """The embedding of every image of a split, class by class in the order of its table."""

    values: np.ndarray  # [N, D] float32
    table: ClassTable

    def of(self, plan: Plan) -> Tensor:
        """As images whose pixels are their embedding: [E, S + Q, D, 1, 1]."""
        sorter = self.table.ids.argsort(kind="stable")
        position = sorter[np.searchsorted(self.table.ids, plan.classes, sorter=sorter)]  # [E, way]
        position = np.take_along_axis(position, plan.labels, axis=1)
        first = np.cumsum(self.table.counts) - self.table.counts
        place = first[position] + plan.rows - self.table.starts[position]
        return torch.from_numpy(self.values[place])[..., None, None]


def possible(method: Method, table: ClassTable, images: int) -> bool:
    """Whether ``images`` images of episodes cost more than every image of the split once, and the method allows it."""
    total = int(table.counts.sum())
    fits = total * method.width * 4 <= MOST_BYTES
    return method.embeds_once and images > total and fits and not looks_at_the_batch(method.backbone)


def embed_part(
    method: Method, preprocess: Preprocess, dataset: Dataset, table: ClassTable, part: range, device: torch.device
) -> np.ndarray:
    """Embeddings [len(part), D] of the images ``part`` of a split, numbered class by class."""
    numbers = np.asarray(part, dtype=np.int64)
    ends = np.cumsum(table.counts)
    position = np.searchsorted(ends, numbers, side="right")
    rows = table.starts[position] + numbers - (ends - table.counts)[position]
    turns = class_turns(table.ids[position], dataset.manifest.rotations)
    out = []
    with torch.no_grad():
        for start in range(0, len(rows), IMAGES):
            chunk = slice(start, start + IMAGES)
            pixels = torch.from_numpy(dataset.gather(rows[chunk])).to(device)
            if len(dataset.manifest.rotations) > 1:
                pixels = quarter_turns(pixels, turns[chunk].to(device))
            out.append(in_pieces(method.backbone, preprocess(pixels)).float().cpu().numpy())
    return np.concatenate(out)


@contextmanager
def given_embeddings(method: Method) -> Iterator[None]:
    """Within: the method takes embeddings [..., D, 1, 1] in place of images."""
    backbone = method.backbone
    method.backbone = _Given(int(backbone.out_features))  # type: ignore[arg-type]
    try:
        yield
    finally:
        method.backbone = backbone


class _Given(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_features = features

    def forward(self, embeddings: Tensor) -> Tensor:
        """[N, D, 1, 1] -> [N, D]."""
        return embeddings.flatten(1)
