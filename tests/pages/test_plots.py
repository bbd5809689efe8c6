"""Plots: the right marks at the right places, equal files for equal data."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from pipeline.charts import plots
from pipeline.charts.plots import (
    accuracy_by_way_and_shot,
    embedding_projection,
    episode_picture,
    learning_curve,
    project,
)

RNG = np.random.default_rng(0)
HISTORY = [
    {"step": s, "train/loss": 1 / s, **({"val/accuracy": 1 - 1 / s, "val/interval": 0.02} if s % 10 == 0 else {})}
    for s in range(1, 41)
]
RESULTS = [
    {"way": way, "shot": shot, "accuracy": 0.9 - way / 100 + shot / 100, "interval": 0.01}
    for way in (5, 20)
    for shot in (1, 5)
]
IMAGES = RNG.integers(0, 256, (8, 3, 9, 9), dtype=np.uint8)
PLOTS = {
    "curve": lambda kind: learning_curve(HISTORY, "a run", kind),
    "accuracy": lambda kind: accuracy_by_way_and_shot(RESULTS, "a run", kind),
    "embeddings": lambda kind: embedding_projection(RNG_POINTS, np.repeat(np.arange(4), 5), None, "a run", kind),
    "episode": lambda kind: episode_picture(
        IMAGES[:4],
        np.asarray([0, 1, 0, 1]),
        IMAGES[4:],
        np.asarray([1, 1, 0, 0]),
        np.asarray([1, 0, 0, 0]),
        None,
        "a",
        kind,
    ),
}
RNG_POINTS = RNG.normal(size=(20, 16))


@pytest.mark.parametrize("name", PLOTS)
def test_equal_data_give_equal_files(name: str) -> None:
    png, svg = PLOTS[name]("png"), PLOTS[name]("svg")
    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[0] > 300 and pixels.std() > 5
    assert b"<svg" in svg and png == PLOTS[name]("png") and svg == PLOTS[name]("svg")


@pytest.mark.parametrize(
    "history",
    [[], [{"step": 5, "train/loss": 1.0}], [{"step": 5, "val/accuracy": 0.5}], [{"step": 1, "train/loss": np.nan}]],
)
def test_a_short_history_is_drawn_too(history: list[dict[str, float]]) -> None:
    assert learning_curve(history).startswith(b"\x89PNG")


def test_projection_is_that_of_the_covariance() -> None:
    embeddings = RNG.normal(size=(50, 6)) * np.asarray([5, 3, 1, 1, 1, 1]) + 7
    points, shares = project(embeddings)
    values, vectors = np.linalg.eigh(np.cov(embeddings.T))
    want = (embeddings - embeddings.mean(0)) @ vectors[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(points), np.abs(want), atol=1e-10)
    np.testing.assert_allclose(shares, values[::-1][:2] / values.sum(), atol=1e-12)
    turned = project(-embeddings)[0]
    np.testing.assert_allclose(np.abs(turned), np.abs(points), atol=1e-10)
    assert project(embeddings[:1])[0].shape == (1, 2) and project(embeddings[:, :1])[0].shape == (50, 2)
    assert np.isfinite(project(np.ones((3, 4)))[0]).all()


def test_smoothing_is_a_centred_mean() -> None:
    values = RNG.normal(size=200)
    smooth = plots._smooth(values)
    for i in range(200):
        reach = min(i, 199 - i, 5)
        assert smooth[i] == pytest.approx(values[i - reach : i + reach + 1].mean())


def test_labels_keep_their_distance_and_order() -> None:
    placed = plots._apart(np.asarray([0.9, 0.91, 0.2, 1.0]), 0.05, 1.0)
    np.testing.assert_allclose(placed, [0.86, 0.91, 0.2, 1.0])


def test_every_wrong_answer_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[tuple[str, int]] = []
    picture = plots._picture

    def note(axes: Axes, image: np.ndarray, colour: str, width: float) -> None:
        marks.append((colour, int(image.sum())))
        picture(axes, image, colour, width)

    monkeypatch.setattr(plots, "_picture", note)
    truth, given = np.asarray([1, 1, 0, 0]), np.asarray([1, 0, 0, 1])
    episode_picture(IMAGES[:4], np.asarray([0, 1, 0, 1]), IMAGES[4:], truth, given)
    colours = {total: colour for colour, total in marks}
    for image, right in zip(IMAGES[4:], truth == given, strict=True):
        assert colours[int(image.sum())] == (plots.RIGHT if right else plots.WRONG)
    assert len(marks) == 8
