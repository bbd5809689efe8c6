"""Glyphs: pure functions of their numbers, the same pixels everywhere, and classes that differ."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pipeline.data.sources.glyphs import Glyphs, draw_glyphs, stroke_programs
from pipeline.errors import PipelineError


def test_shape_and_ink() -> None:
    glyphs = draw_glyphs(range(12), per_class=5)
    assert glyphs.shape == (12, 5, 1, 28, 28) and glyphs.dtype == np.uint8
    ink = glyphs.reshape(60, -1).astype(float).mean(axis=1)
    assert (ink > 5).all() and (ink < 100).all()
    assert (glyphs.reshape(60, -1).max(axis=1) == 255).all()


def test_a_drawing_depends_on_its_class_number_and_seed_alone() -> None:
    all_at_once = draw_glyphs(range(40), per_class=20, seed=3)
    np.testing.assert_array_equal(draw_glyphs([17], per_class=4, seed=3)[0], all_at_once[17, :4])
    np.testing.assert_array_equal(draw_glyphs([5], per_class=3, seed=3, first_drawing=7)[0], all_at_once[5, 7:10])
    assert (draw_glyphs(range(40), per_class=20, seed=4) != all_at_once).any(axis=(1, 2, 3, 4)).all()


def test_pixels_are_those_of_every_machine() -> None:
    digest = hashlib.sha256(draw_glyphs(range(480)).tobytes()).hexdigest()
    assert digest == "a5da99c4b90b2e8ac45b80a1c9cd1ea98a9326b881f27be8b05688165521aa91"


def test_all_drawings_differ() -> None:
    glyphs = draw_glyphs(range(100)).reshape(2000, -1)
    assert len(np.unique(glyphs, axis=0)) == 2000


def test_drawings_of_a_class_are_closer_to_each_other_than_to_other_classes() -> None:
    """In pixels, the nearest of five classes is right more often than by chance and far less often than always."""
    glyphs = draw_glyphs(range(100)).reshape(100, 20, -1).astype(np.float64) / 255
    generator = np.random.default_rng(0)
    right = []
    for _ in range(300):
        classes = generator.choice(100, 5, replace=False)
        support, query = glyphs[classes, 0], glyphs[classes, 1 + generator.integers(19)]
        distance = ((query[:, None] - support[None]) ** 2).sum(axis=2)
        right.append((distance.argmin(axis=1) == np.arange(5)).mean())
    assert 0.45 < np.mean(right) < 0.80


def test_programs_stay_on_the_page() -> None:
    programs = stroke_programs(np.arange(200), seed=0)
    drawn = programs[programs < 5]
    assert drawn.min() > 0.1 and drawn.max() < 0.9


def test_the_default_split_is_320_60_100_by_seed() -> None:
    plan = Glyphs().plan(1024, print)
    assert {split: len(names) for split, names in plan.splits.items()} == {"train": 320, "val": 60, "test": 100}
    assert sorted(name for names in plan.splits.values() for name in names) == plan.classes
    assert Glyphs(seed=1).plan(1024, print).splits != plan.splits


@pytest.mark.parametrize(("classes", "chunk_rows"), [(10, 1024), (10, 37), (3, 7)])
def test_chunks_hold_every_drawing_once(classes: int, chunk_rows: int) -> None:
    source = Glyphs(classes=classes, per_class=20)
    plan = source.plan(chunk_rows, print)
    chunks = [chunk for order in plan.orders for chunk in source.read(order, chunk_rows)]
    numbers = np.concatenate([chunk.classes for chunk in chunks])
    assert (np.diff(numbers) >= 0).all() and np.bincount(numbers).tolist() == [20] * classes
    assert all(len(chunk.images) <= chunk_rows for chunk in chunks)
    names = [name for chunk in chunks for name in chunk.names]
    assert len(set(names)) == 20 * classes
    images = np.concatenate([chunk.images for chunk in chunks])
    np.testing.assert_array_equal(images, draw_glyphs(range(classes)).reshape(-1, 1, 28, 28))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(PipelineError, match="classes=2"):
        Glyphs(classes=2)
