"""Means, intervals and paired differences of per-episode accuracies."""

import math
from dataclasses import dataclass

import numpy as np

Z95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A mean with the half-width of its 95 % interval."""

    mean: float
    interval: float
    episodes: int


def estimate(values: np.ndarray, student: bool = False) -> Estimate:
    """Mean and 95 % interval of per-episode values [n].

    1.96 s/sqrt(n) with n-1 in the variance (Snell, R2-D2, Ravi); ``student``: with the t quantile (relation network).
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n < 2:
        return Estimate(float(values.mean()) if n else math.nan, math.nan, n)
    z = _student(0.975, n - 1) if student else Z95
    return Estimate(float(values.mean()), float(z * values.std(ddof=1) / math.sqrt(n)), n)


def _student(probability: float, freedom: int) -> float:
    """Quantile of Student's t. SciPy is imported here, since training never asks."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


@dataclass(frozen=True)
class Comparison:
    """Is ``b`` better than ``a`` on the same episodes? ``difference`` is the mean of b - a."""

    difference: float
    low: float  # lower end of the two-sided interval of the difference
    high: float
    confidence: float
    episodes: int

    def better_by(self, margin: float) -> bool:
        """Whether the whole interval lies above ``margin``."""
        return self.low > margin


def paired(a: np.ndarray, b: np.ndarray, confidence: float = 0.95) -> Comparison:
    """Student's paired interval of the mean of b - a, accuracies [n] of two models on the same n episodes."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        got = f"{a.shape} and {b.shape}"
        raise ValueError(f"a paired comparison needs two equally long lists of two or more, not {got}")
    difference = b - a
    n = len(difference)
    half = _student(0.5 + confidence / 2, n - 1) * float(difference.std(ddof=1)) / math.sqrt(n)
    mean = float(difference.mean())
    return Comparison(mean, mean - half, mean + half, confidence, n)
