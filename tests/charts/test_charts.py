"""Plots: the right marks at the right places, equal files for equal data."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from pipeline.charts import classes
from pipeline.charts.accuracy import (
    Line,
    Mark,
    _thin,
    accuracies,
    accuracy_by_shot,
    error_rates,
    learning_curve,
    lines_of,
    reliability,
)  # fmt: skip
from pipeline.charts.classes import episode_picture, project, projection
from pipeline.charts.style import RIGHT, WRONG, apart, clean, short

RNG = np.random.default_rng(0)
ACCURACY = [(float(step), 1 - 1 / step, 0.02) for step in range(10, 41, 10)]
LOSS = [(float(step), 1 / step) for step in range(1, 41)]
RESULTS = [
    {"way": way, "shot": shot, "accuracy": 0.9 - way / 100 + shot / 100, "interval": 0.01}
    for way in (5, 20)
    for shot in (1, 5)
]
PAPERS = [{"way": 5, "shot": 1, "accuracy": 0.95}, {"setting": "in words", "accuracy": 0.5}]
IMAGES = RNG.integers(0, 256, (8, 3, 9, 9), dtype=np.uint8)
PLOTS = {
    "curve": lambda kind: learning_curve(ACCURACY, LOSS, "a run", kind),
    "accuracy": lambda kind: accuracy_by_shot(lines_of(RESULTS, PAPERS), "a run", kind),
    "methods": lambda kind: accuracies([Mark("maml", 0.9, 0.01, 0.95), Mark("reptile", 0.8)], kind),
    "rates": lambda kind: error_rates([("5 classes", [("pass", 0.1), ("fail", 0.3)])], kind),
    "reliability": lambda kind: reliability([(0.3, 0.2, 10), (0.9, 0.95, 40)], kind),
    "projection": lambda kind: projection(
        RNG_POINTS[:, :2], np.repeat(np.arange(4), 5), ["$a$", "<b>", "c\x00", "d"], (0.5, 0.2), "a run", kind
    ),
    "episode": lambda kind: episode_picture(
        IMAGES[:4],
        np.asarray([0, 1, 0, 1]),
        IMAGES[4:],
        np.asarray([1, 1, 0, 0]),
        np.asarray([1, 0, 0, 0]),
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
    assert pixels.shape[0] > 200 and pixels.std() > 5
    assert b"<svg" in svg and png == PLOTS[name]("png") and svg == PLOTS[name]("svg")


@pytest.mark.parametrize(
    ("accuracy", "loss"), [([], []), ([], [(5.0, 1.0)]), ([(5.0, 0.5, np.nan)], []), ([], [(1.0, np.nan)])]
)
def test_a_short_history_is_drawn_too(accuracy: list, loss: list) -> None:
    assert learning_curve(accuracy, loss).startswith(b"\x89PNG")


def test_results_become_a_line_a_way() -> None:
    first, second = lines_of(RESULTS[::-1], PAPERS)
    assert first == Line(5, [(1, 0.86, 0.01), (5, 0.9, 0.01)], [(1, 0.95)]) and second.way == 20
    assert second.papers == []


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


def test_a_long_loss_is_drawn_by_means() -> None:
    points = [(float(step), float(step)) for step in range(1000)]
    thin = _thin(points, 300)
    assert len(thin) == 250 and thin[0] == (3.0, 1.5) and thin[-1] == (999.0, 997.5)
    assert _thin(points[:300], 300) == points[:300] and _thin([]) == []


def test_labels_keep_their_distance_and_order() -> None:
    np.testing.assert_allclose(apart([0.9, 0.91, 0.2, 1.0], 0.05, 1.0), [0.86, 0.91, 0.2, 1.0])


def test_long_names_that_differ_at_their_ends_stay_different() -> None:
    names = [f"Carcharodon_carcharias_juvenile_{number:03d}" for number in (1, 2)]
    first, second = (short(name, 20) for name in names)
    assert first != second and len(first) == len(second) == 20 and "…" in first
    assert short("plain", 20) == "plain" and clean("a\x00\ud800b") == "a\ufffd\ufffdb"


def test_every_wrong_answer_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[tuple[str, int]] = []
    picture = classes._picture

    def note(axes: Axes, image: np.ndarray, colour: str, width: float) -> None:
        marks.append((colour, int(image.sum())))
        picture(axes, image, colour, width)

    monkeypatch.setattr(classes, "_picture", note)
    truth, given = np.asarray([1, 1, 0, 0]), np.asarray([1, 0, 0, 1])
    episode_picture(IMAGES[:4], np.asarray([0, 1, 0, 1]), IMAGES[4:], truth, given)
    colours = {total: colour for colour, total in marks}
    for image, right in zip(IMAGES[4:], truth == given, strict=True):
        assert colours[int(image.sum())] == (RIGHT if right else WRONG)
    assert len(marks) == 8
