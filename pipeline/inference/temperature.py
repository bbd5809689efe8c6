"""Stated probabilities: how often they are right, and one number that makes them so (Guo et al. 2017)."""

from typing import Any

import numpy as np

BINS = 10
_COLDEST, _HOTTEST = 1e-6, 1e6


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T whose softmax(logits / T) has the least cross-entropy.

    One answer's worth of the labels is spread over all classes (as Platt's targets are), so that T stays finite where
    every answer is right: N of them say no more than that.

    Args:
        logits: [N, way].
        labels: int64 [N].
    """
    logits = logits.astype(np.float64)
    n, way = logits.shape
    centred = logits - logits.max(axis=1, keepdims=True)
    if way < 2 or not np.ptp(centred, axis=1).any():
        return 1.0
    spread = 1 / (n + 1)
    target = ((1 - spread) * centred[np.arange(n), labels] + spread * centred.mean(axis=1)).mean()

    def slope(inverse: float) -> float:
        """Of the cross-entropy over 1 / T, which is convex."""
        weights = np.exp(inverse * centred)
        expected = (weights * centred).sum(axis=1) / weights.sum(axis=1)
        return float(expected.mean() - target)

    low, high = 1 / _HOTTEST, 1 / _COLDEST
    for _ in range(80):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(1 / np.sqrt(low * high))


def reliability(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Stated probability [N] against share of right answers, bool [N], in bins of equal width.

    ``error`` is the expected calibration error: the mean difference of both, weighted by the queries of a bin.
    """
    known = np.isfinite(confidence)
    confidence, right = confidence[known], right[known].astype(float)
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins, error = [], 0.0
    for number in range(BINS):
        mine = place == number
        if mine.any():
            mean, share = float(confidence[mine].mean()), float(right[mine].mean())
            bins.append({"queries": int(mine.sum()), "confidence": mean, "accuracy": share})
            error += mine.mean() * abs(mean - share)
    return {"bins": bins, "error": float(error)}
