"""Episodes: pure, right by construction, uniform; what a split cannot serve is refused."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from pipeline.data import planners
from pipeline.data.dataset import ClassTable
from pipeline.data.episodes import (
    EpisodeSpec,
    check_spec,
    permute,
    plan_episodes,
    plan_groups,
    plan_images,
    shape_of,
)
from pipeline.data.planners import ImagePlanner
from pipeline.errors import PipelineError


def table(counts, split="train") -> ClassTable:
    counts = np.asarray(counts, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return ClassTable(np.arange(len(counts)) * 10, starts, counts, split)


@pytest.mark.parametrize("balanced", [True, False])
def test_an_episode_is_what_its_spec_says(balanced):
    classes = table([9, 20, 15, 12, 30, 11, 9, 25])
    plan = plan_episodes(classes, EpisodeSpec(4, 2, 5, balanced_query=balanced), 3, np.arange(200))
    assert plan.rows.shape == plan.labels.shape == (200, 4 * 2 + 4 * 5)
    for episode in range(200):
        assert len(set(plan.classes[episode])) == 4
        assert len(set(plan.rows[episode])) == 28, "an image is used twice"
        position = plan.classes[episode][plan.labels[episode]] // 10
        start, end = classes.starts[position], classes.starts[position] + classes.counts[position]
        assert ((start <= plan.rows[episode]) & (plan.rows[episode] < end)).all(), "an image of another class"
        assert Counter(plan.labels[episode][: plan.support]) == {label: 2 for label in range(4)}
        if balanced:
            assert Counter(plan.labels[episode][plan.support :]) == {label: 5 for label in range(4)}
    if not balanced:
        assert len({tuple(np.bincount(row[8:], minlength=4)) for row in plan.labels}) > 50


def test_an_episode_is_a_pure_function_of_its_number():
    classes, spec = table([20] * 50), EpisodeSpec(5, 1, 4)
    whole = plan_episodes(classes, spec, 7, np.arange(100))
    shuffled = np.random.default_rng(0).permutation(100)
    other = plan_episodes(classes, spec, 7, shuffled)
    np.testing.assert_array_equal(other.rows, whole.rows[shuffled])
    np.testing.assert_array_equal(other.classes, whole.classes[shuffled])
    assert not np.array_equal(plan_episodes(classes, spec, 8, np.arange(100)).rows, whole.rows)
    renamed = table([20] * 50, split="val")
    assert not np.array_equal(plan_episodes(renamed, spec, 7, np.arange(100)).rows, whole.rows)


def test_every_ordered_choice_is_equally_likely():
    """All ordered pairs of classes and of images, by a chi-square test."""
    plan = plan_episodes(table([4] * 4), EpisodeSpec(2, 1, 1), 0, np.arange(60_000))
    pairs = Counter(map(tuple, plan.classes // 10))
    assert set(pairs) == set(itertools.permutations(range(4), 2))
    expected = 60_000 / 12
    assert sum((n - expected) ** 2 / expected for n in pairs.values()) < 35  # 11 degrees of freedom, 1e-4
    first = plan.classes[:, 0] // 10
    images = Counter(zip(plan.rows[:, 0] - 4 * first, plan.rows[:, 2] - 4 * first, strict=True))
    assert set(images) == set(itertools.permutations(range(4), 2))
    assert sum((n - expected) ** 2 / expected for n in images.values()) < 35


def test_pooled_queries_are_uniform_over_what_is_left():
    plan = plan_episodes(table([3, 9]), EpisodeSpec(2, 1, 2, balanced_query=False), 0, np.arange(30_000))
    of_small = (np.take_along_axis(plan.classes, plan.labels[:, 2:], axis=1) == 0).mean()
    assert abs(of_small - 2 / 10) < 0.005  # 2 of the 10 remaining images
    used = np.bincount(plan.rows[:, 2:].ravel(), minlength=12)
    assert used[:3].min() > 0.95 * used[:3].max() and used[3:].min() > 0.95 * used[3:].max()


def test_shapes_drawn_from_ranges_belong_to_steps():
    spec = EpisodeSpec((3, 6), (1, 4), 2, tasks=8)
    shapes = [shape_of(spec, 0, "train", step) for step in range(500)]
    assert {shape[0] for shape in shapes} == {3, 4, 5, 6} and {shape[1] for shape in shapes} == {1, 2, 3, 4}
    plan = plan_episodes(table([20] * 10), spec, 0, np.arange(16, 24))
    assert (plan.way, plan.support // plan.way) == shapes[2][:2]
    with pytest.raises(ValueError, match="different shapes"):
        plan_episodes(table([20] * 10), spec, 0, np.arange(16))


def test_time_and_memory_do_not_depend_on_the_number_of_images():
    huge = table([10**9, 10**9, 10**9])
    plan = plan_episodes(huge, EpisodeSpec(3, 5, 15), 0, np.arange(10))
    assert all(len(set(row)) == 60 for row in plan.rows)


def test_images_are_a_new_permutation_every_epoch():
    classes = table([5, 7, 11])
    rows = plan_images(classes, 0, np.arange(23 * 3)).rows.reshape(3, 23)
    assert all(sorted(epoch) == list(range(23)) for epoch in rows)
    assert not np.array_equal(rows[0], rows[1])
    part = plan_images(classes, 0, np.arange(30, 40))
    np.testing.assert_array_equal(part.rows, rows.reshape(-1)[30:40])
    np.testing.assert_array_equal(part.labels, np.searchsorted([5, 12, 23], part.rows, side="right"))


@pytest.mark.parametrize("grouping", [None, (2, 3)])
def test_the_images_of_many_steps_are_drawn_at_once(monkeypatch, grouping):
    """Step by step, planning takes longer than a step on features does."""
    planner, drawn = ImagePlanner(table([5, 7, 11]), 12, 0, grouping), []
    for name in ("plan_images", "plan_groups"):
        plan_of = getattr(planners, name)
        monkeypatch.setattr(planners, name, lambda *args, plan_of=plan_of: drawn.append(plan_of(*args)) or drawn[-1])
    ranks = [planner.plans(3, 5, rank, 2) for rank in (0, 1)]
    assert len(drawn) == 2 and all(len(plan) == 6 for plans in ranks for plan in plans)
    rows = np.stack([[plan.rows for plan in plans] for plans in ranks], axis=1)  # [steps, ranks, share]
    numbers = np.arange(3 * 12, 8 * 12) if grouping is None else np.arange(3 * 2, 8 * 2)
    together = (
        plan_images(planner.table, 0, numbers)
        if grouping is None
        else plan_groups(planner.table, 0, numbers, *grouping)
    )
    np.testing.assert_array_equal(rows.reshape(-1), together.rows)


def test_permute_reaches_every_permutation_alike():
    orders = Counter(tuple(permute(np.arange(4), 4, (key, 1))) for key in range(4800))
    assert len(orders) == 24
    assert sum((n - 200) ** 2 / 200 for n in orders.values()) < 60  # 23 degrees of freedom, 1e-4: 55
    for size in (1, 2, 3, 17, 64, 1000):
        assert sorted(permute(np.arange(size), size, (size, 9))) == list(range(size))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (EpisodeSpec(9, 1, 1), "episode.way=9: split 'train' has only 8 classes"),
        (EpisodeSpec(2, (1, 5), 5), "the smallest class of split 'train' has only 9 images"),
        (EpisodeSpec(2, 9, 1, balanced_query=False), "split 'train'"),
    ],
)
def test_what_a_split_cannot_serve_is_refused(spec, says):
    with pytest.raises(PipelineError, match="episode") as error:
        check_spec(table([9, 20, 15, 12, 30, 11, 9, 25]), spec)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_impossible_specs_are_refused():
    with pytest.raises(PipelineError, match="shot=0"):
        EpisodeSpec(5, 0, 1)
    with pytest.raises(PipelineError, match="way"):
        EpisodeSpec((5, 3), 1, 1)
