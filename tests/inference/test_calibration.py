"""The threshold for 'unknown', where the truth is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.inference import Calibration, CalibrationPoint, FewShotClassifier, calibrate, class_images
from pipeline.methods.base import Method, State
from tests.inference.conftest import SHAPE


class Nearest(Method):
    """Logit of a class: minus the squared difference of values, so that scores are known without a network."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1))
        self.asked: list[tuple[int, ...]] = []

    def adapt(self, support: Tensor, labels: Tensor, way: int | None = None) -> State:
        assert way is not None
        self.asked.append(tuple(support.shape[:2]))
        value = support[..., 0]
        return {"means": torch.stack([value[labels == c].view(len(value), -1).mean(1) for c in range(way)], 1)}

    def classify(self, state: State, query: Tensor) -> Tensor:
        return -((query[..., 0][:, :, None] - state["means"][:, None]) ** 2)


class Value(nn.Module):
    """Two pixels, whole and fraction, to the value [..., 1] they stand for."""

    def forward(self, images: Tensor) -> Tensor:
        return images[..., 0, 0].float() + images[..., 0, 1].float() / 256


def values_of(images: np.ndarray) -> np.ndarray:
    return images[:, 0, 0, 0] + images[:, 0, 0, 1] / 256


def value_images(centres: np.ndarray, spread: float):
    """Every class is values around its centre; equal numbers give equal images."""

    def images(classes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        pairs = zip(classes.tolist(), numbers.tolist(), strict=True)
        noise = np.asarray([np.random.default_rng(pair).normal() for pair in pairs])
        values = np.clip(centres[classes] + spread * noise, 0, 255)
        return np.stack([values // 1, values % 1 * 256], axis=-1).astype(np.uint8)[:, None, None]

    return images


def test_rates_hold_on_fresh_episodes() -> None:
    centres = np.linspace(5, 250, 60)
    images = value_images(centres, 2.0)
    method = Nearest()
    calibration = calibrate(method, Value(), images, [20] * 60, ways=(5, 20), shots=(1, 5), queries=4000, target=0.05)
    assert calibration is not None
    assert [(p.shot, p.way) for p in calibration.points] == [(1, 5), (1, 20), (5, 5), (5, 20)]
    rng = np.random.default_rng(99)
    for point in calibration.points:
        accepted, rejected = [], []
        for _ in range(200):
            drawn = rng.permutation(60)[: point.way + 5]
            shown = np.stack([rng.permutation(20)[: point.shot + 1] for _ in drawn])
            values = values_of(images(np.repeat(drawn, point.shot + 1), shown.ravel())).reshape(len(drawn), -1)
            means, other = values[: point.way, :-1].mean(1), values[:, -1]
            logits = -((other[:, None] - means[None]) ** 2)
            scored = {"logit": logits.max(1), "energy": np.logaddexp.reduce(logits / point.temperature, axis=1)}
            score = scored[point.score] * (point.temperature if point.score == "energy" else 1)
            rejected += (score[: point.way] < point.threshold).tolist()
            accepted += (score[point.way :] >= point.threshold).tolist()
        assert np.mean(accepted) == pytest.approx(0.05, abs=0.025)
        assert point.false_acceptance == pytest.approx(0.05, abs=0.02)
        assert np.mean(rejected) == pytest.approx(point.false_rejection, abs=0.06)
        assert point.enrolled_queries >= 4000 and point.stranger_queries >= 4000
    harder, easier = calibration.points[1], calibration.points[2]
    assert harder.equal_error > easier.equal_error
    assert harder.threshold > easier.threshold  # among more classes a stranger comes nearer to one by chance


def test_episodes_never_show_an_image_twice_nor_enrol_a_stranger() -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def images(classes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        seen.append((classes, numbers))
        return np.zeros((len(classes), 1, 600, 600), dtype=np.uint8)  # so large that every call is one episode

    counts = np.asarray([3, 8, 4, 9, 5, 7, 6, 2, 1])
    calibrate(Nearest(), Value(), images, counts, ways=(4,), shots=(2,), queries=8)
    assert len(seen) == 3
    for classes, numbers in seen:
        assert len(set(zip(classes, numbers, strict=True))) == len(classes)
        assert (numbers < counts[classes]).all() and (counts[classes] > 2).all()
        support, asked = classes[:8], classes[8:]
        assert (support == np.repeat(support[::2], 2)).all() and len(set(support)) == 4
        np.testing.assert_array_equal(asked[:4], support[::2])
        assert not set(asked[4:]) & set(support) and len(asked) == 7  # seven classes of three images: three strangers


def test_grid_is_what_the_split_allows() -> None:
    def grid(classes: int, count: int, fixed: int | None = None) -> list[tuple[int, int]]:
        method = Nearest()
        method.fixed_way = fixed
        calibration = calibrate(method, Value(), value_images(np.zeros(classes), 9), [count] * classes, queries=4)
        return [] if calibration is None else [(p.way, p.shot) for p in calibration.points]

    assert grid(100, 20) == [(way, shot) for shot in (1, 2, 5) for way in (1, 5, 20, 50)]
    assert grid(16, 3) == [(way, shot) for shot in (1, 2) for way in (1, 5, 12)]
    assert grid(16, 20, fixed=5) == [(5, 1), (5, 2), (5, 5)]
    assert grid(4, 2) == [(1, 1), (3, 1)]
    assert grid(5, 20, fixed=5) == []
    assert grid(1, 20) == [] and grid(9, 1) == []


def test_equal_seeds_give_equal_thresholds(classifier: FewShotClassifier, pictures: np.ndarray) -> None:
    def run(seed: int) -> Calibration | None:
        return calibrate(
            classifier.method,
            classifier.preprocess,
            lambda classes, numbers: pictures[classes, numbers],
            [12] * 40,
            ways=(5, 20),
            shots=(1,),
            queries=100,
            seed=seed,
        )

    assert run(3) == run(3) != run(4)


def test_strangers_are_told_from_enrolled(classifier: FewShotClassifier, pictures: np.ndarray) -> None:
    calibration = calibrate(
        classifier.method,
        classifier.preprocess,
        lambda classes, numbers: pictures[20:][classes, numbers],
        [12] * 20,
        ways=(10,),
        shots=(2,),
        queries=300,
        target=0.1,
    )
    served = FewShotClassifier(classifier.spec, classifier.method, classifier.preprocess, calibration)
    enrolment = served.enrol(pictures[:10, :2].reshape(-1, *SHAPE), np.repeat(np.arange(10), 2))
    inside = served.classify(enrolment, pictures[:10, 2:].reshape(-1, *SHAPE))
    outside = served.classify(enrolment, pictures[10:20].reshape(-1, *SHAPE))
    point = calibration.points[0]
    assert inside.threshold == outside.threshold == point.threshold
    assert 1 - inside.known.mean() == pytest.approx(point.false_rejection, abs=0.25)
    assert outside.known.mean() < 0.5 < inside.known.mean()
    assert served.classify(enrolment, pictures[10:20, 0], threshold="none").known.all()


def test_nearest_point_by_ratios() -> None:
    def point(way: int, shot: int) -> CalibrationPoint:
        return CalibrationPoint(way, shot, float(way * 100 + shot), 0.05, 0.1, 0.07, 0.9, 10, 10)

    calibration = Calibration(0.05, "val", 0, tuple(point(w, s) for w in (5, 20, 50) for s in (1, 2, 5)))
    for way, shot in [(50, 1.4), (50, 1.5), (11, 1), (9, 3), (200, 9), (1, 1), (31, 1), (32, 1)]:
        want = min(
            calibration.points,
            key=lambda p: math.dist((math.log(p.way), math.log(p.shot)), (math.log(way), math.log(shot))),
        )
        assert calibration.nearest(way, shot) == want
    assert calibration.nearest(50, 1.5).threshold == 5002.0  # 50 people with one or two images each
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration


def test_scores_that_are_no_numbers_are_refused() -> None:
    method = Nearest()
    images = value_images(np.zeros(8), 1)
    method.classify = lambda state, query: torch.full((*query.shape[:2], 5), math.nan)  # type: ignore[method-assign]
    with pytest.raises(PipelineError, match="scores that are NaN or infinite"):
        calibrate(method, Value(), images, [5] * 8, ways=(5,), shots=(1,), queries=10)
    with pytest.raises(PipelineError, match="target=1.5"):
        calibrate(method, Value(), images, [5] * 8, target=1.5)


def test_rotated_classes_are_turned_counter_clockwise() -> None:
    image = np.asarray([[1, 2], [3, 4]], dtype=np.uint8)[None, None]
    images = class_images(lambda rows: np.repeat(image, len(rows), 0), np.zeros(4, np.int64), np.arange(4))
    turned = images(np.arange(4), np.zeros(4, np.int64))[:, 0]
    np.testing.assert_array_equal(turned[0], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(turned[1], [[2, 4], [1, 3]])
    np.testing.assert_array_equal(turned[2], [[4, 3], [2, 1]])
    np.testing.assert_array_equal(turned[3], [[3, 1], [4, 2]])
    rows = class_images(lambda rows: rows, np.asarray([10, 50]))(np.asarray([1, 0, 1]), np.asarray([2, 3, 0]))
    np.testing.assert_array_equal(rows, [52, 13, 50])
