"""Figures of an open-set decision, from scores alone: accept a query when its score is at least the threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FOLDS = 5
_Z95 = 1.96


def error_rates(enrolled: np.ndarray, strangers: np.ndarray, threshold: float) -> tuple[float, float]:
    """(false acceptance, false rejection): strangers at or above the threshold, enrolled queries below it."""
    return float(np.mean(strangers >= threshold)), float(np.mean(enrolled < threshold))


def threshold_at(strangers: np.ndarray, target: float) -> float:
    """The least threshold at which at most the share ``target`` of the strangers' scores [N] float64 is accepted."""
    descending = np.sort(strangers)[::-1]
    allowed = min(int(np.floor(target * len(descending))), len(descending) - 1)  # so many strangers may pass
    return float(np.nextafter(descending[allowed], np.inf))


def equal_error_rate(enrolled: np.ndarray, strangers: np.ndarray) -> float:
    """Mean of false acceptance and false rejection where they are nearest to each other, over all thresholds."""
    enrolled, strangers = np.sort(enrolled), np.sort(strangers)
    thresholds = np.concatenate([enrolled, strangers, [np.inf]])
    false_rejection = np.searchsorted(enrolled, thresholds, side="left") / len(enrolled)
    false_acceptance = 1 - np.searchsorted(strangers, thresholds, side="left") / len(strangers)
    best = np.argmin(np.abs(false_acceptance - false_rejection))
    return float((false_acceptance[best] + false_rejection[best]) / 2)


def auroc(enrolled: np.ndarray, strangers: np.ndarray) -> float:
    """Probability that an enrolled query scores above a stranger, ties by half: scores [N] and [M]."""
    return float(_above(enrolled, strangers).mean())


def oscr(enrolled: np.ndarray, right: np.ndarray, strangers: np.ndarray) -> float:
    """Area under the share of enrolled queries that are accepted and named rightly over the share of strangers that
    pass (open-set classification rate, Dhamija et al. 2018).

    That is the probability that an enrolled query is named rightly and scores above a stranger: AUROC where every
    answer is right. ``right`` is bool [N].
    """
    return float((_above(enrolled, strangers) * right).mean())


def _above(enrolled: np.ndarray, strangers: np.ndarray) -> np.ndarray:
    """[N] share of the strangers whose score is lower than an enrolled query's; equal ones count half."""
    ordered = np.sort(strangers)
    lower, lower_or_equal = (np.searchsorted(ordered, enrolled, side=side) for side in ("left", "right"))
    return (lower + lower_or_equal) / (2 * len(ordered))


@dataclass(frozen=True)
class Share:
    """A share that was counted, with its 95 % interval."""

    value: float
    low: float
    high: float


def share_of(counted: np.ndarray, groups: np.ndarray, distinct: int) -> Share:
    """The share of ``counted`` bool [N], whose members come in groups.

    Images of a class, and the same image asked twice, tell less than as many independent ones: Wilson's interval
    is for the effective number of observations, from the variance between groups (Korn & Graubard 1998), which is
    at most ``distinct``, the number of different images.

    Args:
        groups: int64 [N], the class of every image.
        distinct: different images among them.
    """
    value = float(np.mean(counted))
    _, group = np.unique(groups, return_inverse=True)
    totals, hits = np.bincount(group), np.bincount(group, counted)
    effective = float(distinct)
    if len(totals) < 2:
        effective = 1.0
    elif 0 < value < 1:
        spread = float(np.square(hits - value * totals).sum()) * len(totals) / (len(totals) - 1)
        if spread > 0:
            effective = min(effective, value * (1 - value) * float(totals.sum()) ** 2 / spread)
    return _wilson(value, effective)


def _wilson(value: float, n: float) -> Share:
    centre = value + _Z95**2 / (2 * n)
    half = _Z95 * math.sqrt(value * (1 - value) / n + (_Z95 / (2 * n)) ** 2)
    low, high = ((centre + sign * half) / (1 + _Z95**2 / n) for sign in (-1, 1))
    return Share(value, max(0.0, min(low, value)), min(1.0, max(high, value)))


@dataclass(frozen=True)
class Rate:
    """What a threshold that lets a share of the strangers pass did with classes that it was not set on."""

    asked: float  # share of strangers that are to pass
    threshold: float
    passed: Share  # of strangers
    refused: Share  # of enrolled queries


@dataclass(frozen=True)
class Asked:
    """Queries of one kind, over all episodes."""

    scores: np.ndarray  # [N] float64
    classes: np.ndarray  # [N] int64, true class of every query
    distinct: int  # different images among them


def measure_rates(enrolled: Asked, strangers: Asked, shares: Sequence[float], seed: int = 0) -> tuple[Rate, ...]:
    """A threshold for every share, set on all strangers and measured on the strangers of other classes.

    The classes are dealt into :data:`FOLDS`; the strangers of a fold, and the enrolled queries of its classes, are
    judged by the thresholds that the strangers of the other folds give. With fewer than two classes of strangers there
    is nothing to measure: an empty tuple.
    """
    members = np.unique(strangers.classes)
    if len(members) < 2:
        return ()
    rng = np.random.default_rng(seed)
    dealt = [*rng.permutation(members), *rng.permutation(np.setdiff1d(enrolled.classes, members))]
    folds = min(FOLDS, len(members))
    fold = {int(member): place % folds for place, member in enumerate(dealt)}
    fold_of = [np.asarray([fold[int(member)] for member in asked.classes]) for asked in (enrolled, strangers)]
    out = []
    for share in shares:
        passed = np.empty(len(strangers.scores), dtype=bool)
        refused = np.empty(len(enrolled.scores), dtype=bool)
        for number in range(folds):
            inside, outside = (one == number for one in fold_of)
            threshold = threshold_at(strangers.scores[~outside], share)
            refused[inside] = enrolled.scores[inside] < threshold
            passed[outside] = strangers.scores[outside] >= threshold
        out.append(
            Rate(
                share,
                threshold_at(strangers.scores, share),
                share_of(passed, strangers.classes, strangers.distinct),
                share_of(refused, enrolled.classes, enrolled.distinct),
            )
        )
    return tuple(out)
