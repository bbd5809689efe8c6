"""Embed once: where a method sees an image through its backbone alone, no image of a split goes through it twice.

Images go through the network in batches of a fixed size that their size alone decides, since the last bits of an answer
depend on how many are asked at once: they do not depend on how the work was cut.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.augment import Augmentation, augment, step_generator
from pipeline.data.batches import turned
from pipeline.data.dataset import ClassTable, Dataset
from pipeline.data.episodes import Plan
from pipeline.methods.base import Method
from pipeline.nets.features import Features
from pipeline.nets.norm import looks_at_the_batch
from pipeline.nets.pieces import PIXELS
from pipeline.nets.preprocess import Preprocess

IMAGES = 512  # embedded at once, at most: by a GPU, and by networks that look at the batch
MOST_BYTES = 2**30  # of a split's embeddings, which every evaluating process maps


@dataclass(frozen=True)
class Embeddings:
    """The embedding of every image of a table's classes, class by class in its order."""

    values: np.ndarray  # [N, D] float32
    table: ClassTable

    def of(self, plan: Plan) -> Tensor:
        """As images whose pixels are their embedding: [E, S + Q, D, 1, 1]."""
        position = np.take_along_axis(self.table.find(plan.classes), plan.labels, axis=1)  # [E, S + Q]
        place = self.table.firsts[position] + plan.rows - self.table.starts[position]
        return torch.from_numpy(self.values[place])[..., None, None]

    def of_class(self, positions: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Of the images ``numbers`` [N] of the classes at ``positions`` [N] of the table: float32 [N, D, 1, 1]."""
        return self.values[self.table.firsts[positions] + numbers][..., None, None]


def possible(method: Method, table: ClassTable, images: int) -> bool:
    """Whether ``images`` images of episodes cost more than every image of the split once, and the method allows it."""
    total = int(table.counts.sum())
    fits = total * method.width * 4 <= MOST_BYTES
    alone = not (isinstance(method.backbone, Features) or looks_at_the_batch(method.backbone))
    return method.embeds_once and images > total and fits and alone


def batch_size(shape: tuple[int, int, int], gpu: bool = False) -> int:
    """How many images, of the ``shape`` that a network sees, go through it at once, whatever the network is."""
    return IMAGES if gpu else max(1, min(IMAGES, PIXELS // (shape[1] * shape[2])))


def at_once(network: nn.Module, preprocess: Preprocess, dataset: Dataset, device: torch.device) -> int:
    """How many images of a dataset go through this network at once: parts of a split begin at its multiples."""
    shape = (dataset.shape[0], *(preprocess.size or dataset.shape[1:]))
    return batch_size(shape, device.type != "cpu" or looks_at_the_batch(network))


@dataclass(frozen=True)
class View:
    """Images as an augmentation changes them, equal for equal numbers."""

    number: int
    augmentation: Augmentation
    seed: int


@torch.no_grad()
def embed_part(
    network: nn.Module,
    preprocess: Preprocess,
    dataset: Dataset,
    table: ClassTable,
    part: range,
    device: torch.device,
    batch: int | None = None,
    view: View | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Embeddings float32 [len(part), D] of the images ``part`` of a split, numbered class by class.

    Args:
        network: the backbone, in evaluation mode on ``device``.
        part: begins at a multiple of the batch, so that a split cut in parts has the bits of the whole.
        batch: images at once; None: :func:`at_once`. The last batch is filled up with its last image.
        view: what is embedded instead of the images as they are.
        out: float32 [at least len(part), D], whose first rows are filled and returned.
    """
    fills = not looks_at_the_batch(network)
    batch = batch or at_once(network, preprocess, dataset, device)
    numbers = np.asarray(part, dtype=np.int64)
    position, rows = table.images(numbers)
    ids, rotations = table.ids[position], dataset.manifest.rotations
    if out is None:
        out = np.empty((len(rows), int(network.out_features)), dtype=np.float32)  # type: ignore[arg-type]
    out = out[: len(rows)]
    gathered = np.empty((batch, *dataset.shape), dtype=dataset.manifest.dtype)
    for start in range(0, len(rows), batch):
        here = np.arange(start, start + batch) if fills else np.arange(start, min(start + batch, len(rows)))
        here = np.minimum(here, len(rows) - 1)
        pixels = turned(torch.from_numpy(dataset.gather(rows[here], out=gathered[: len(here)])), ids[here], rotations)
        if view is not None:
            generator = step_generator("cpu", "view", view.seed, view.number, int(numbers[start]))
            pixels = augment(pixels, view.augmentation, generator)
        found = network(preprocess(pixels.to(device))).float().cpu().numpy()
        out[start : start + batch] = found[: len(out) - start]
    return out


def class_features(
    method: Method,
    preprocess: Preprocess,
    dataset: Dataset,
    table: ClassTable,
    classes: int,
    images: int,
    embeddings: Embeddings | None = None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Features [classes * images, D] of the first images of a few classes, evenly spaced in the table, class by class:
    to be looked at; positions of the classes in the table; images of each. ``classes`` and ``images`` are at most."""
    chosen = np.linspace(0, len(table) - 1, min(classes, len(table))).astype(int)
    each = min(images, int(table.counts[chosen].min()))
    if embeddings is not None:
        found = embeddings.of_class(np.repeat(chosen, each), np.tile(np.arange(each), len(chosen)))
        return found.reshape(len(found), -1), chosen, each
    few = replace(table, ids=table.ids[chosen], starts=table.starts[chosen], counts=np.full(len(chosen), each))
    device = next(method.parameters(), torch.empty(0)).device
    whole = range(each * len(chosen))
    return embed_part(method.extractor(), preprocess, dataset, few, whole, device), chosen, each


@contextmanager
def given_embeddings(method: Method) -> Iterator[None]:
    """Within: the method takes embeddings [..., D, 1, 1] in place of images."""
    backbone = method.backbone
    method.backbone = Features((int(backbone.out_features), 1, 1))  # type: ignore[arg-type]
    try:
        yield
    finally:
        method.backbone = backbone
