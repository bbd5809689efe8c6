"""Plans to tensors: from row numbers to the batch a method is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.batch import Batch, CoTraining, Episodes, Images
from pipeline.data.augment import quarter_turns
from pipeline.data.dataset import ClassTable, Dataset
from pipeline.data.episodes import (
    AnyPlan,
    CoPlan,
    EpisodeSpec,
    ImagePlan,
    Plan,
    plan_episodes,
    plan_groups,
    plan_images,
)


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
    """The share of every step that each worker gets, for classical training: ``batch_size`` images a step.

    With ``grouping`` (classes, images) they come in groups of so many classes with so many images each.
    """

    table: ClassTable
    batch_size: int
    seed: int
    grouping: tuple[int, int] | None = None

    @property
    def per_step(self) -> int:
        return self.batch_size

    def plan(self, step: int, rank: int = 0, world_size: int = 1) -> ImagePlan:
        share = self.batch_size // world_size
        first = step * self.batch_size + rank * share
        if self.grouping is None:
            return plan_images(self.table, self.seed, first, share)
        size = self.grouping[0] * self.grouping[1]
        return plan_groups(self.table, self.seed, first // size, share // size, *self.grouping)

    def plans(self, first: int, count: int, rank: int, world_size: int) -> list[ImagePlan]:
        return [self.plan(step, rank, world_size) for step in range(first, first + count)]


@dataclass(frozen=True)
class CoPlanner:
    """Episodes and images in every step."""

    episodes: EpisodePlanner
    images: ImagePlanner

    @property
    def per_step(self) -> int:
        return self.episodes.per_step

    def plan(self, step: int, rank: int = 0, world_size: int = 1) -> CoPlan:
        return CoPlan(self.episodes.plan(step, rank, world_size), self.images.plan(step, rank, world_size))

    def plans(self, first: int, count: int, rank: int, world_size: int) -> list[CoPlan]:
        episodes, images = (p.plans(first, count, rank, world_size) for p in (self.episodes, self.images))
        return [CoPlan(*pair) for pair in zip(episodes, images, strict=True)]  # type: ignore[arg-type]


Planner = EpisodePlanner | ImagePlanner | CoPlanner


def to_batch(plan: AnyPlan, pixels: Tensor, rotations: list[int]) -> Batch:
    """A batch from a plan and its pixels uint8 [N, C, H, W], which lie in the order of ``plan.rows``.

    Classes that are rotated copies are turned here, on the device of ``pixels``.
    """
    if isinstance(plan, CoPlan):
        of_episodes = plan.episodes.rows.size
        episodes = _episodes(plan.episodes, pixels[:of_episodes], rotations)
        return CoTraining(episodes, _images(plan.images, pixels[of_episodes:], rotations))
    return _images(plan, pixels, rotations) if isinstance(plan, ImagePlan) else _episodes(plan, pixels, rotations)


def _images(plan: ImagePlan, pixels: Tensor, rotations: list[int]) -> Images:
    if len(rotations) > 1:
        pixels = quarter_turns(pixels, class_turns(plan.classes, rotations).to(pixels.device))
    return Images(pixels, _send(plan.labels, pixels.device))


def _episodes(plan: Plan, pixels: Tensor, rotations: list[int]) -> Episodes:
    if len(rotations) > 1:
        of_images = np.take_along_axis(plan.classes, plan.labels, axis=1)
        pixels = quarter_turns(pixels, class_turns(of_images, rotations).reshape(-1).to(pixels.device))
    images = pixels.unflatten(0, plan.rows.shape)
    labels, classes = _send(plan.labels, pixels.device), _send(plan.classes, pixels.device)
    s = plan.support
    return Episodes(images[:, :s], labels[:, :s], images[:, s:], labels[:, s:], classes, plan.way)


def _send(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(array)).to(device, non_blocking=True)


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
