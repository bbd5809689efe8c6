"""What each worker does in each step, as plans. Knows no torch, so that the tasks that plan start fast."""

import math
from dataclasses import dataclass, replace

import numpy as np

from pipeline.data.dataset import ClassTable
from pipeline.data.episodes import EpisodeSpec, ImagePlan, Plan, plan_episodes, plan_groups, plan_images
from pipeline.data.philox import key_of, uniforms

TASK_CPUS = 0.25  # what a task that gathers pixels in the cluster reserves


@dataclass(frozen=True)
class Views:
    """Of a dataset of features: in training every image is as it is or, as often, one of its augmented views."""

    count: int
    rows: int  # of each view
    seed: int

    def of(self, numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The rows [N, columns] of episodes or images ``numbers`` [N], each in a view that their number decides."""
        draws = uniforms(key_of("views", self.seed), numbers, rows.shape[1])
        return rows + self.rows * (draws * (1 + self.count)).astype(np.int64)


@dataclass(frozen=True)
class ImagePlanner:
    """The share of every step that each worker gets, for classical training: ``batch_size`` images per step.

    With ``grouping`` they come in groups: (number of classes, images per class).
    """

    table: ClassTable
    batch_size: int
    seed: int
    grouping: tuple[int, int] | None = None
    views: Views | None = None

    @property
    def per_step(self) -> int:
        return self.batch_size

    def plan(self, step: int, rank: int = 0, world_size: int = 1) -> ImagePlan:
        return self.plans(step, 1, rank, world_size)[0]

    def plans(self, first: int, count: int, rank: int, world_size: int) -> list[ImagePlan]:
        """The plans of ``count`` steps, drawn at once: one by one they cost fifty times as much."""
        size = 1 if self.grouping is None else math.prod(self.grouping)
        numbers = share_of_steps(first, count, self.batch_size // size, rank, world_size).reshape(-1)
        if self.grouping is None:
            plan = plan_images(self.table, self.seed, numbers)
        else:
            plan = plan_groups(self.table, self.seed, numbers, *self.grouping)
        if self.views is not None:
            rows = self.views.of(numbers, plan.rows.reshape(-1, size))
            plan = replace(plan, rows=rows.reshape(-1))
        return plan.split(count)


@dataclass(frozen=True)
class EpisodePlanner:
    """The share of every step that each of ``world_size`` workers gets, for episodic training.

    With ``auxiliary`` every step has its images beside the episodes.
    """

    table: ClassTable
    spec: EpisodeSpec
    seed: int
    auxiliary: ImagePlanner | None = None
    views: Views | None = None

    @property
    def per_step(self) -> int:
        return self.spec.tasks

    def plan(self, step: int, rank: int = 0, world_size: int = 1) -> Plan:
        return self.plans(step, 1, rank, world_size)[0]

    def plans(self, first: int, count: int, rank: int, world_size: int) -> list[Plan]:
        """The plans of ``count`` steps, drawn at once where all steps share a shape."""
        numbers = share_of_steps(first, count, self.spec.tasks, rank, world_size)
        share = numbers.shape[1]
        if self.spec.fixed:
            together = self._episodes(numbers.reshape(-1))
            plans = [together[index * share : (index + 1) * share] for index in range(count)]
        else:
            plans = [self._episodes(of_step) for of_step in numbers]
        if self.auxiliary is None:
            return plans
        images = self.auxiliary.plans(first, count, rank, world_size)
        return [replace(plan, auxiliary=beside) for plan, beside in zip(plans, images, strict=True)]

    def _episodes(self, numbers: np.ndarray) -> Plan:
        plan = plan_episodes(self.table, self.spec, self.seed, numbers)
        return plan if self.views is None else replace(plan, rows=self.views.of(plan.numbers, plan.rows))


def share_of_steps(first: int, count: int, per_step: int, rank: int, world_size: int) -> np.ndarray:
    """What one worker has of ``count`` steps, of which each has ``per_step`` numbers: int64 [count, share]."""
    share = per_step // world_size
    steps = np.arange(first, first + count, dtype=np.int64)
    return steps[:, None] * per_step + rank * share + np.arange(share)


Planner = EpisodePlanner | ImagePlanner
