"""Intervals against the published definitions, the paired comparison against simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluation.statistics import estimate, paired

VECTORS = Path(__file__).parent.parent / "vectors"


def test_published_intervals():
    with np.load(VECTORS / "confidence_interval.npz") as case:
        values = case["in_episode_accuracies"]
        for student, interval in ((False, case["out_ci95_ddof1_196"]), (True, case["out_ci95_student_t"])):
            found = estimate(values, student)
            assert abs(found.mean - case["out_mean"]) < 1e-12 and found.episodes == len(values)
            assert abs(found.interval - interval) < 1e-10, student


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        found = estimate(rng.binomial(75, 0.6, 200) / 75)
        inside += abs(found.mean - 0.6) <= found.interval
    assert 0.93 < inside / 2000 < 0.97


def test_paired_sees_what_unpaired_cannot():
    rng = np.random.default_rng(1)
    hardness = rng.normal(0.6, 0.1, 500)
    a = hardness + rng.normal(0, 0.02, 500)
    b = hardness + 0.01 + rng.normal(0, 0.02, 500)
    found = paired(a, b)
    assert found.low > 0 and found.better_by(0.0) and not found.better_by(0.01)
    assert estimate(b).mean - estimate(b).interval < estimate(a).mean + estimate(a).interval
    assert paired(b, a).high < 0


def test_paired_interval_is_students():
    from scipy import stats

    rng = np.random.default_rng(2)
    a, b = rng.random(30), rng.random(30)
    expected = stats.ttest_rel(b, a).confidence_interval(0.9)
    found = paired(a, b, 0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_different_episodes_cannot_be_paired():
    for number, other in ((3, 4), (1, 1)):
        with pytest.raises(ValueError, match="two equally long lists of two or more"):
            paired(np.zeros(number), np.zeros(other))
