"""Plans to tensors: from row numbers to the batch a method is given."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeline.batch import Batch, Episodes, Images
from pipeline.data.augment import quarter_turns
from pipeline.data.dataset import Dataset
from pipeline.data.episodes import AnyPlan, ImagePlan, Plan
from pipeline.data.planners import Planner


def to_batch(plan: AnyPlan, pixels: Tensor, rotations: list[int]) -> Batch:
    """A batch from a plan and its pixels uint8 [N, C, H, W], which lie in the order of ``plan.pixel_rows``.

    Classes that are rotated copies are turned here, on the device of ``pixels``.
    """
    if isinstance(plan, ImagePlan):
        return _images(plan, pixels, rotations)
    episodes = _episodes(plan, pixels[: plan.rows.size], rotations)
    if plan.auxiliary is None:
        return episodes
    return replace(episodes, auxiliary=_images(plan.auxiliary, pixels[plan.rows.size :], rotations))


def _images(plan: ImagePlan, pixels: Tensor, rotations: list[int]) -> Images:
    pixels = turned(pixels, plan.classes, rotations)
    return Images(pixels, _send(plan.labels, pixels.device))


def _episodes(plan: Plan, pixels: Tensor, rotations: list[int]) -> Episodes:
    of_images = plan.classes[np.arange(len(plan))[:, None], plan.labels]
    pixels = turned(pixels, of_images.reshape(-1), rotations)
    images = pixels.unflatten(0, plan.rows.shape)
    labels, classes = _send(plan.labels, pixels.device), _send(plan.classes, pixels.device)
    s = plan.support
    return Episodes(images[:, :s], labels[:, :s], images[:, s:], labels[:, s:], classes, plan.way)


def _send(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(array)).to(device, non_blocking=True)


def read_batch(dataset: Dataset, plan: AnyPlan, device: torch.device | str = "cpu") -> Batch:
    """The batch of a plan, its pixels gathered in this process."""
    pixels = torch.from_numpy(dataset.gather(plan.pixel_rows)).to(device)
    return to_batch(plan, pixels, dataset.manifest.rotations)


def local_batches(
    dataset: Dataset, planner: Planner, first: int, count: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[int, Batch]]:
    """The steps [first, first + count) of one worker, gathered in this process: what every stream must equal."""
    for step in range(first, first + count):
        yield step, read_batch(dataset, planner.plan(step, rank, world_size))


def turned(pixels: Tensor, classes: np.ndarray, rotations: list[int]) -> Tensor:
    """Images [N, C, H, W] of classes whose ids are [N]: those of a class that is a rotated copy, turned."""
    if len(rotations) == 1:
        return pixels
    return quarter_turns(pixels, class_turns(classes, rotations).to(pixels.device))


def class_turns(classes: np.ndarray, rotations: list[int]) -> Tensor:
    """How many quarter turns the class of each id stands for: int64, in the shape of ``classes``."""
    return torch.from_numpy(np.asarray(rotations, dtype=np.int64)[classes % len(rotations)] // 90 % 4)
