"""Thresholds and error rates against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inference.rates import equal_error_rate, error_rates, threshold_at

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


def test_error_rates_count_the_threshold_itself_as_accepted() -> None:
    assert error_rates(np.asarray([1.0, 2.0]), np.asarray([2.0, 0.0, 1.9, 3.0]), 2.0) == (0.5, 0.5)


def test_separable_scores_have_no_errors() -> None:
    enrolled, strangers = np.asarray([3.0, 4.0, 5.0]), np.asarray([0.0, 1.0, 2.0])
    assert equal_error_rate(enrolled, strangers) == pytest.approx(0.0)
