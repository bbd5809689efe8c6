"""Thresholds and error rates against counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inference.rates import (
    Asked,
    Rate,
    Share,
    auroc,
    auroc_of,
    equal_error_rate,
    measure_rates,
    oscr,
    share_of,
    threshold_at,
)

SCORES = st.lists(st.sampled_from([x / 4 for x in range(-12, 13)]), min_size=1, max_size=40)  # ties are common


@settings(max_examples=200, deadline=None)
@given(SCORES, st.floats(0.01, 0.99))
def test_threshold_is_the_least_that_keeps_the_target(strangers: list[float], target: float) -> None:
    scores = np.asarray(strangers, dtype=np.float64)
    threshold = threshold_at(scores, target)
    assert sum(s >= threshold for s in strangers) <= target * len(strangers)
    lower = [s for s in strangers if s < threshold]
    assert sum(s >= max(lower) for s in strangers) > target * len(strangers)  # the next lower score would break it


@settings(max_examples=200, deadline=None)
@given(SCORES, SCORES)
def test_equal_error_is_the_best_of_all_thresholds(enrolled: list[float], strangers: list[float]) -> None:
    def rates(t: float) -> tuple[float, float]:
        return sum(s >= t for s in strangers) / len(strangers), sum(e < t for e in enrolled) / len(enrolled)

    candidates = [rates(t) for t in [*enrolled, *strangers, 1e9]]
    gap = min(abs(a - r) for a, r in candidates)
    allowed = {round((a + r) / 2, 9) for a, r in candidates if abs(abs(a - r) - gap) < 1e-12}
    assert round(equal_error_rate(np.asarray(enrolled), np.asarray(strangers)), 9) in allowed


def test_separable_scores_have_no_errors() -> None:
    enrolled, strangers = np.asarray([3.0, 4.0, 5.0]), np.asarray([0.0, 1.0, 2.0])
    assert equal_error_rate(enrolled, strangers) == pytest.approx(0.0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(SCORES.map(lambda s: s[0]), st.booleans()), min_size=1, max_size=30), SCORES)
def test_areas_are_shares_of_pairs(queries: list[tuple[float, bool]], strangers: list[float]) -> None:
    scores, right = np.asarray([q[0] for q in queries]), np.asarray([q[1] for q in queries])
    pairs = [((s > t) + (s == t) / 2, r) for s, r in queries for t in strangers]
    assert auroc(scores, np.asarray(strangers)) == pytest.approx(np.mean([won for won, _ in pairs]))
    assert oscr(scores, right, np.asarray(strangers)) == pytest.approx(np.mean([won * r for won, r in pairs]))


def test_oscr_is_the_area_under_the_curve_of_accepted_right_answers() -> None:
    rng = np.random.default_rng(0)
    enrolled, strangers, right = rng.normal(1, 1, 300), rng.normal(0, 1, 200), rng.random(300) < 0.8
    thresholds = np.sort(np.concatenate([enrolled, strangers, [-np.inf, np.inf]]))[::-1]
    passed = [np.mean(strangers >= t) for t in thresholds]
    named = [np.mean((enrolled >= t) & right) for t in thresholds]
    assert oscr(enrolled, right, strangers) == pytest.approx(np.trapezoid(named, passed))


def asked(scores: np.ndarray, answers: np.ndarray | None = None) -> Asked:
    """Scores [classes, images], each image asked once."""
    classes = np.repeat(np.arange(len(scores)), scores.shape[1])
    return Asked(scores.ravel(), classes, np.arange(scores.size) if answers is None else answers.ravel(), scores.size)


@pytest.mark.parametrize(("of_stranger", "of_answer"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.7)])
def test_intervals_hold_for_new_classes(of_stranger: float, of_answer: float) -> None:
    """Strangers of a class have a part of their score in common, as have those that an enrolled class attracts; the
    promise is for classes that are not yet seen."""
    rng = np.random.default_rng(1)

    def draw(classes: int, images: int) -> tuple[np.ndarray, np.ndarray]:
        answers = rng.integers(0, classes, (classes, images))
        common = of_stranger * rng.normal(size=(classes, 1)) + of_answer * rng.normal(size=classes)[answers]
        return common + rng.normal(size=(classes, images)), answers

    held, naive = [], []
    for trial in range(300):
        mine = asked(*draw(30, 20))
        [rate] = measure_rates(mine, mine, [0.1], seed=trial)
        truth = float(np.mean(draw(2000, 4)[0] >= rate.threshold))
        naive.append(abs(truth - 0.1) <= 1.96 * math.sqrt(0.09 / mine.scores.size))
        held.append(rate.passed.low <= truth <= rate.passed.high)
    assert np.mean(held) >= 0.88 > 0.75 > np.mean(naive)


@pytest.mark.parametrize(("classes", "shared"), [(5, 0.7), (7, 0.7), (7, 0.3)])
def test_intervals_of_few_classes_hold_and_unkept_promises_are_told(classes: int, shared: float) -> None:
    """A variance between few classes is uncertain. Where as many strangers pass as would break a promise twice over,
    the promise was not given."""
    rng = np.random.default_rng(1)

    def draw(number: int, images: int) -> tuple[np.ndarray, np.ndarray]:
        answers = rng.integers(0, number, (number, images))
        common = shared * (rng.normal(size=(number, 1)) + rng.normal(size=number)[answers])
        return common + rng.normal(size=(number, images)), answers

    others = np.sort(draw(20_000, 1)[0].ravel())
    held, broken = [], []
    for trial in range(300):
        mine = asked(*draw(classes, 20))
        [rate] = measure_rates(mine, mine, [0.1], seed=trial)
        truth = 1 - np.searchsorted(others, rate.threshold) / len(others)
        held.append(rate.passed.low <= truth <= rate.passed.high)
        broken.append(rate.borne_out and truth > 0.2)
    assert np.mean(held) >= 0.91 and np.mean(broken) <= 0.03


def test_a_rate_is_borne_out_by_the_upper_end_of_its_interval() -> None:
    refused = Share(0.3, 0.2, 0.4)
    assert Rate(0.05, 0.0, Share(0.05, 0.02, 0.1), refused).borne_out
    assert not Rate(0.05, 0.0, Share(0.05, 0.02, 0.11), refused).borne_out


def test_share_of_independent_images_is_wilsons() -> None:
    def of(*times: int) -> Asked:
        return Asked(np.zeros(0), np.tile(np.arange(100), times), np.tile(np.arange(100), times), 100)

    counted = np.arange(100) < 5
    found = share_of(counted, of(1))
    assert (found.value, found.low, found.high) == pytest.approx((0.05, 0.0215, 0.1118), abs=1e-3)
    repeated = share_of(np.tile(counted, 10), of(10))
    assert (repeated.low, repeated.high) == pytest.approx((found.low, found.high), abs=2e-3)
    none = share_of(np.zeros(100, bool), of(1))
    assert none.low == 0 and none.high == pytest.approx(3.84 / 103.84, abs=1e-3)


def test_the_interval_of_an_area_is_for_other_classes() -> None:
    rng = np.random.default_rng(2)

    def draw(classes: int) -> np.ndarray:
        return rng.normal(0, 1, (classes, 1)) + rng.normal(0, 1, (classes, 10))

    held, width = [], []
    for _ in range(200):
        found = auroc_of(asked(draw(30) + 2), asked(draw(30)))
        held.append(found.low <= 0.8413 <= found.high)  # Phi(2 / sqrt(1 + 1 + 1 + 1))
        width.append(found.high - found.low)
    assert 0.88 <= np.mean(held) <= 0.99 and np.mean(width) < 0.25


def test_rates_are_of_classes_that_the_threshold_was_not_set_on() -> None:
    """Each class of strangers has a score of its own: no threshold of others says what it does."""
    scores = np.repeat(np.arange(10.0)[:, None], 4, 1)
    [rate] = measure_rates(asked(scores + 100), asked(scores), [0.1])
    assert rate.threshold == pytest.approx(8) and np.mean(scores >= rate.threshold) == 0.1
    assert rate.passed.value >= 0.1 and rate.passed.high > 0.3 and rate.refused.value == 0
    [alone] = measure_rates(asked(scores), asked(scores[:1]), [0.1])  # one class tells nothing about others
    assert alone.passed.high - alone.passed.low > 0.7
