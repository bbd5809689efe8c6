"""Error rates of an open-set decision: accept a query when its score is at least the threshold."""

from __future__ import annotations

import numpy as np


def error_rates(enrolled: np.ndarray, strangers: np.ndarray, threshold: float) -> tuple[float, float]:
    """(false acceptance, false rejection): strangers at or above the threshold, enrolled queries below it."""
    return float(np.mean(strangers >= threshold)), float(np.mean(enrolled < threshold))


def threshold_at(strangers: np.ndarray, target: float) -> float:
    """The least threshold at which at most the share ``target`` of the strangers' scores [N] float64 is accepted."""
    descending = np.sort(strangers)[::-1]
    allowed = int(np.floor(target * len(descending)))  # so many strangers may pass
    return float(np.nextafter(descending[allowed], np.inf))


def equal_error_rate(enrolled: np.ndarray, strangers: np.ndarray) -> float:
    """Mean of false acceptance and false rejection where they are nearest to each other, over all thresholds."""
    enrolled, strangers = np.sort(enrolled), np.sort(strangers)
    thresholds = np.concatenate([enrolled, strangers, [np.inf]])
    false_rejection = np.searchsorted(enrolled, thresholds, side="left") / len(enrolled)
    false_acceptance = 1 - np.searchsorted(strangers, thresholds, side="left") / len(strangers)
    best = np.argmin(np.abs(false_acceptance - false_rejection))
    return float((false_acceptance[best] + false_rejection[best]) / 2)
