"""Plans to tensors: from row numbers to the batch a method is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.batch import Batch, Episodes, Images
from pipeline.data.augment import quarter_turns
from pipeline.data.dataset import ClassTable, Dataset
from pipeline.data.episodes import EpisodeSpec, ImagePlan, Plan, plan_episodes, plan_images


@dataclass(frozen=True)
class EpisodePlanner:
    """The share of every step that each of ``world_size`` workers gets, for episodic training."""

    table: ClassTable
    spec: EpisodeSpec
    seed: int

    @property
    def per_step(self) -> int:
        return self.spec.tasks

    def plan(self, step: int, rank: int = 0, world_size: int = 1) -> Plan:
        return plan_episodes(self.table, self.spec, self.seed, self._numbers(step, rank, world_size))

    def _numbers(self, step: int, rank: int, world_size: int) -> np.ndarray:
        share = self.spec.tasks // world_size
        return step * self.spec.tasks + rank * share + np.arange(share)

    def plans(self, first: int, count: int, rank: int, world_size: int) -> list[Plan]:
        """The plans of ``count`` steps, drawn at once where all steps share a shape."""
        if not self.spec.fixed:
            return [self.plan(step, rank, world_size) for step in range(first, first + count)]
        numbers = [self._numbers(step, rank, world_size) for step in range(first, first + count)]
        together = plan_episodes(self.table, self.spec, self.seed, np.concatenate(numbers))
        share = len(numbers[0])
        return [together[index * share : (index + 1) * share] for index in range(count)]


@dataclass(frozen=True)
class ImagePlanner:
    """The share of every step that each worker gets, for classical training: ``batch_size`` images a step."""

    table: ClassTable
    batch_size: int
    seed: int

    @property
    def per_step(self) -> int:
        return self.batch_size

    def plan(self, step: int, rank: int = 0, world_size: int = 1) -> ImagePlan:
        share = self.batch_size // world_size
        return plan_images(self.table, self.seed, step * self.batch_size + rank * share, share)

    def plans(self, first: int, count: int, rank: int, world_size: int) -> list[ImagePlan]:
        return [self.plan(step, rank, world_size) for step in range(first, first + count)]


Planner = EpisodePlanner | ImagePlanner


def to_batch(plan: Plan | ImagePlan, pixels: Tensor, rotations: list[int]) -> Batch:
    """A batch from a plan and its pixels uint8 [N, C, H, W], which lie in the order of ``plan.rows``.

    Classes that are rotated copies are turned here, on the device of ``pixels``.
    """
    device = pixels.device

    def send(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array)).to(device, non_blocking=True)

    if isinstance(plan, ImagePlan):
        if len(rotations) > 1:
            pixels = quarter_turns(pixels, class_turns(plan.classes, rotations).to(device))
        return Images(pixels, send(plan.labels))
    if len(rotations) > 1:
        of_images = np.take_along_axis(plan.classes, plan.labels, axis=1)
        pixels = quarter_turns(pixels, class_turns(of_images, rotations).reshape(-1).to(device))
    images = pixels.unflatten(0, plan.rows.shape)
    labels = send(plan.labels)
    s = plan.support
    return Episodes(images[:, :s], labels[:, :s], images[:, s:], labels[:, s:], send(plan.classes), plan.way)


def local_batches(
    dataset: Dataset, planner: Planner, first: int, count: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[int, Batch]]:
    """The steps [first, first + count) of one worker, gathered in this process: what every stream must equal."""
    for step in range(first, first + count):
        plan = planner.plan(step, rank, world_size)
        pixels = torch.from_numpy(dataset.gather(plan.rows))
        yield step, to_batch(plan, pixels, dataset.manifest.rotations)


def class_turns(classes: np.ndarray, rotations: list[int]) -> Tensor:
    """How many quarter turns the class of each id stands for: int64, in the shape of ``classes``."""
    return torch.from_numpy(np.asarray(rotations, dtype=np.int64)[classes % len(rotations)] // 90 % 4)
