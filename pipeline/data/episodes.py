"""Episode plans: episode i is a pure function of (seed, split, i).

A plan holds row numbers, not pixels. No state, no order and no number of workers enters it, so that step t of a run
consumes episodes [t*G, (t+1)*G) wherever and however often it is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.dataset import ClassTable
from pipeline.data.philox import key_of, philox, uniforms
from pipeline.errors import PipelineError

Range = int | tuple[int, int]
_SHAPE, _CLASSES, _CLASS_ORDER, _IMAGES, _IMAGE_ORDER, _QUERY = range(6)  # streams of random numbers


@dataclass(frozen=True)
class EpisodeSpec:
    """The form of the episodes of a run or an evaluation.

    ``way``, ``shot`` and ``query`` (a class) are numbers, or ranges (low, high) with both ends included, from which
    every step draws: the episodes of one step share their shape, so that the step is one dense tensor. With
    ``balanced_query`` false, ``query * way`` queries are drawn uniformly from all remaining images of the episode's
    classes (TADAM). ``tasks`` is the number of episodes of a step, over all workers.
    """

    way: Range
    shot: Range
    query: Range
    tasks: int = 1
    balanced_query: bool = True

    def __post_init__(self) -> None:
        for name, value in (("way", self.way), ("shot", self.shot), ("query", self.query)):
            low, high = bounds(value)
            if low < 1 or high < low:
                raise PipelineError(f"{name}={value}: give a number of at least 1, or [low, high]")
        if self.tasks < 1:
            raise PipelineError(f"tasks={self.tasks}: a step needs at least one episode")

    @property
    def fixed(self) -> bool:
        return all(low == high for low, high in map(bounds, (self.way, self.shot, self.query)))


def bounds(value: Range) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


@dataclass(frozen=True)
class Plan:
    """E episodes of one shape, as rows of a dataset. Columns: ``support`` images first, then the queries."""

    numbers: np.ndarray  # [E] int64, the episodes' numbers
    rows: np.ndarray  # [E, S + Q] int64
    labels: np.ndarray  # [E, S + Q] int64, 0..way-1
    classes: np.ndarray  # [E, way] int64, class ids of the table
    support: int  # S
    auxiliary: ImagePlan | None = None  # images of the same step, for methods that are trained on both

    @property
    def way(self) -> int:
        return self.classes.shape[1]

    @property
    def pixel_rows(self) -> np.ndarray:
        """[N] int64, the rows in the order of the step's pixels: episode by episode, then the auxiliary images."""
        rows = self.rows.reshape(-1)
        return rows if self.auxiliary is None else np.concatenate([rows, self.auxiliary.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> Plan:
        return Plan(self.numbers[part], self.rows[part], self.labels[part], self.classes[part], self.support)


@dataclass(frozen=True)
class ImagePlan:
    """Labelled images for classical training, as rows of a dataset."""

    numbers: np.ndarray  # [B] int64, places in the endless sequence of images, or of groups
    rows: np.ndarray  # [B] int64
    labels: np.ndarray  # [B] int64, position of the class in the table
    classes: np.ndarray  # [B] int64, class ids of the table

    @property
    def pixel_rows(self) -> np.ndarray:
        return self.rows

    def __len__(self) -> int:
        return len(self.rows)

    def split(self, count: int) -> list[ImagePlan]:
        """``count`` plans of equal size, one after the other."""
        parts = (np.split(array, count) for array in (self.numbers, self.rows, self.labels, self.classes))
        return [ImagePlan(*arrays) for arrays in zip(*parts, strict=True)]


AnyPlan = Plan | ImagePlan


def check_spec(table: ClassTable, spec: EpisodeSpec, section: str = "episode") -> None:
    """Refuse, in one line that names the key and the limit, episodes that the split cannot serve.

    Args:
        section: of the configuration, that the keys stand in; "": none.
    """
    prefix = section and f"{section}."
    way, shot, query = (bounds(value)[1] for value in (spec.way, spec.shot, spec.query))
    if way > len(table):
        raise PipelineError(
            f"{prefix}way={way}: split {table.split!r} has only {len(table)} classes; give {prefix}way={len(table)} "
            "at most, or ingest it with a larger share for that split (data.source.fractions), under another data.name"
        )
    smallest = int(table.counts.min())
    if spec.balanced_query and shot + query > smallest:
        raise PipelineError(
            f"{prefix}shot + {prefix}query = {shot} + {query}: the smallest class of split {table.split!r} has "
            f"only {smallest} images{_who(table, shot + query)}"
        )
    if not spec.balanced_query and (shot >= smallest or way * query > way * (smallest - shot)):
        raise PipelineError(
            f"{prefix}query={query}: {way} classes of {smallest} images leave fewer than {way * query} queries "
            f"beside {shot} shots in split {table.split!r}{_who(table, shot + query)}"
        )


def _who(table: ClassTable, least: int) -> str:
    names = f" ({table.too_small(least)})" if table.names else ""
    return f"{names}; smaller classes are left out by data.source.min_images={least} at jobs.ingest"


def shape_of(spec: EpisodeSpec, seed: int, split: str, step: int) -> tuple[int, int, int]:
    """(way, shot, query) of every episode of a step."""
    if spec.fixed:
        return bounds(spec.way)[0], bounds(spec.shot)[0], bounds(spec.query)[0]
    draws = uniforms(key_of("episode", seed, split), np.asarray([step]), 3, _SHAPE)[0]
    way, shot, query = (
        low + int(draw * (high - low + 1))
        for draw, (low, high) in zip(draws, map(bounds, (spec.way, spec.shot, spec.query)), strict=True)
    )
    return way, shot, query


def plan_episodes(table: ClassTable, spec: EpisodeSpec, seed: int, numbers: np.ndarray) -> Plan:
    """The episodes of the given numbers [E], which must share a shape (lie in one step unless the shape is fixed)."""
    numbers = np.asarray(numbers, dtype=np.int64)
    steps = np.unique(numbers // spec.tasks)
    if len(steps) > 1 and not spec.fixed:
        raise ValueError("episodes of different steps have different shapes: plan them step by step")
    way, shot, query = shape_of(spec, seed, table.split, int(steps[0]))
    key = key_of("episode", seed, table.split)
    episodes, count = numbers.astype(np.uint64), len(numbers)

    population = np.full((count, 1), len(table))
    position = _choose(key, episodes, population, way, _CLASSES, _CLASS_ORDER)[:, 0]  # [E, way]
    starts, counts = table.starts[position], table.counts[position]
    if spec.balanced_query:
        chosen = _choose(key, episodes, counts, shot + query, _IMAGES, _IMAGE_ORDER)  # [E, way, shot + query]
        rows = starts[..., None] + chosen
        query_rows = rows[..., shot:].reshape(count, way * query)
        query_labels = np.broadcast_to(np.repeat(np.arange(way), query), query_rows.shape)
    else:
        chosen = _choose(key, episodes, counts, shot, _IMAGES, _IMAGE_ORDER)
        rows = starts[..., None] + chosen
        query_labels, offset = _pooled_queries(key, episodes, counts, chosen, way * query)
        query_rows = np.take_along_axis(starts, query_labels, axis=1) + offset
    support_rows = rows[..., :shot].reshape(count, way * shot)
    support_labels = np.broadcast_to(np.repeat(np.arange(way), shot), support_rows.shape)
    return Plan(
        numbers=numbers,
        rows=np.concatenate([support_rows, query_rows], axis=1),
        labels=np.concatenate([support_labels, query_labels], axis=1).astype(np.int64),
        classes=table.ids[position],
        support=way * shot,
    )


def plan_images(table: ClassTable, seed: int, numbers: np.ndarray) -> ImagePlan:
    """The images ``numbers`` of an endless sequence in which every epoch is a new permutation of the split."""
    total = int(table.counts.sum())
    epochs, place = np.divmod(numbers, total)
    for epoch in np.unique(epochs):
        mine = epochs == epoch
        place[mine] = permute(place[mine], total, key_of("images", seed, table.split, int(epoch)))
    labels, rows = table.images(place)
    return ImagePlan(numbers, rows, labels.astype(np.int64), table.ids[labels])


def plan_groups(table: ClassTable, seed: int, numbers: np.ndarray, classes: int, images: int) -> ImagePlan:
    """The groups ``numbers``, each ``images`` images of ``classes`` classes: group by group, class by class."""
    spec = EpisodeSpec(classes, 1, images - 1)
    plan = plan_episodes(table, spec, seed, numbers)
    order = plan.labels.argsort(axis=1, kind="stable")  # support and queries of a class side by side
    rows, labels = (np.take_along_axis(array, order, axis=1) for array in (plan.rows, plan.labels))
    ids = np.take_along_axis(plan.classes, labels, axis=1).reshape(-1)
    position = table.find(ids).astype(np.int64)
    return ImagePlan(plan.numbers.repeat(classes * images), rows.reshape(-1), position, ids)


def permute(position: np.ndarray, size: int, key: tuple[int, int], rounds: int = 8) -> np.ndarray:
    """Where a keyed permutation of range(size) sends ``position``, in memory that does not depend on ``size``.

    A balanced Feistel network over the next even power of two, walked along its cycle until it falls inside
    (Black & Rogaway 2002).
    """
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    value = position.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        left, right = value[outside] >> shift, value[outside] & mask
        for turn in range(rounds):
            zeros = np.zeros_like(right)
            word = philox(np.stack([right, zeros + np.uint64(turn), zeros, zeros]), key)[0]
            left, right = right, left ^ (word & mask)
        value[outside] = (left << shift) | right
        outside = value >= np.uint64(size)
    return value.astype(np.int64)


def _choose(key: Any, episodes: np.ndarray, sizes: np.ndarray, k: int, draw: int, order: int) -> np.ndarray:
    """A uniform ordered sample of k out of range(n) for every n in ``sizes`` [E, P]: int64 [E, P, k].

    Floyd's algorithm (Bentley & Floyd 1987), whose k steps run over all episodes at once, then a random order:
    time and memory do not depend on n.
    """
    count, places = sizes.shape
    random = uniforms(key, episodes, places * k, draw).reshape(count, places, k)
    chosen = np.full((count, places, k), -1, dtype=np.int64)
    for step in range(k):
        last = sizes - k + step
        candidate = (random[..., step] * (last + 1)).astype(np.int64)
        taken = (chosen[..., :step] == candidate[..., None]).any(axis=-1)
        chosen[..., step] = np.where(taken, last, candidate)
    if k > 1:
        shuffle = uniforms(key, episodes, places * k, order).reshape(count, places, k)
        chosen = np.take_along_axis(chosen, shuffle.argsort(axis=-1, kind="stable"), axis=-1)
    return chosen


def _pooled_queries(
    key: Any, episodes: np.ndarray, counts: np.ndarray, support: np.ndarray, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """Queries drawn from all images that are not support: labels [E, total] and offsets in their class [E, total]."""
    left = counts - support.shape[-1]  # [E, way]
    ends = np.cumsum(left, axis=1)
    pooled = _choose(key, episodes, ends[:, -1:], total, _QUERY, _QUERY + 1)[:, 0]
    labels = (pooled[..., None] >= ends[:, None, :]).sum(axis=-1)
    offset = pooled - np.take_along_axis(ends - left, labels, axis=1)
    taken = np.take_along_axis(np.sort(support, axis=-1), labels[..., None], axis=1)  # [E, total, shot]
    for place in range(taken.shape[-1]):  # step over the support images, in ascending order
        offset = offset + (offset >= taken[..., place])
    return labels, offset
