"""Figures of an open-set decision, from scores alone: accept a query when its score is at least the threshold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FOLDS = 5
MOST = 2.0  # times the share of strangers that was asked for: a rate that may let more pass is no promise
_Z95 = 1.96


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


@dataclass(frozen=True)
class Asked:
    """Queries of one kind, over all episodes."""

    scores: np.ndarray  # [N] float64
    classes: np.ndarray  # [N] int64, true class of every query
    answers: np.ndarray  # [N] int64, the enrolled class that it was taken for
    distinct: int  # different images among them


def share_of(counted: np.ndarray, asked: Asked) -> Share:
    """The share of ``counted`` bool [N] among queries.

    Images of a class, images that the same enrolled class attracts, and one image asked twice, tell less than as many
    independent ones. Wilson's interval is for the effective number of observations (Korn & Graubard 1998), at most the
    number of different images, from the variance between classes, true and answered (Cameron, Gelbach & Miller 2011).
    A variance of so few classes is itself uncertain: it has Student's quantile of their number less one.
    """
    value = float(np.mean(counted))
    effective = float(asked.distinct)
    fewest = min(len(np.unique(asked.classes)), len(np.unique(asked.answers)))
    if len(np.unique(asked.classes)) < 2:
        effective = 1.0
    elif 0 < value < 1:
        one_way = [_spread(counted, groups) for groups in (asked.classes, asked.answers)]
        both = sum(one_way) - _spread(counted, np.stack([asked.classes, asked.answers], axis=1))
        variance = max(both, *one_way) / len(counted) ** 2
        if variance > 0:
            effective = max(1.0, min(effective, value * (1 - value) / variance))
    return _wilson(value, max(1.0, effective * _certainty(fewest, asked.distinct)))


def _certainty(groups: int, images: int) -> float:
    """What the effective number of observations is multiplied by, as its variance is that of a few ``groups``: the
    square of Student's quantile for independent images over that for groups (Korn & Graubard 1998)."""
    from scipy.special import stdtrit  # here, since a registered model that answers never asks

    independent, between = (float(stdtrit(max(1, n - 1), 0.975)) for n in (images, groups))
    return min(1.0, (independent / between) ** 2)


def _spread(counted: np.ndarray, groups: np.ndarray) -> float:
    """Variance of the number that is ``counted`` [N], between groups [N] or [N, keys]; 0 for a single one."""
    _, group = np.unique(groups, axis=0, return_inverse=True)
    totals, hits = np.bincount(group), np.bincount(group, counted)
    if len(totals) < 2:
        return 0.0
    return float(np.square(hits - counted.mean() * totals).sum()) * len(totals) / (len(totals) - 1)


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

    @property
    def borne_out(self) -> bool:
        """Whether validation says, with 95 % confidence, that no more than :data:`MOST` times as many pass."""
        return borne_out(self.passed.high, self.asked)


def borne_out(high: float, asked: float) -> bool:
    """Whether the upper end of a share's interval keeps to :data:`MOST` times what was asked for."""
    return high <= MOST * asked


def measure_rates(enrolled: Asked, strangers: Asked, shares: Sequence[float], seed: int = 0) -> tuple[Rate, ...]:
    """A threshold for every share, set on all strangers and measured on the strangers of other classes.

    The classes are dealt into :data:`FOLDS`; the strangers of a fold, and the enrolled queries of its classes, are
    judged by the thresholds that the strangers of the other folds give. A single class of strangers tells nothing about
    others: its intervals say so.
    """
    rng = np.random.default_rng(seed)
    members = np.unique(strangers.classes)
    dealt = [*rng.permutation(members), *rng.permutation(np.setdiff1d(enrolled.classes, members))]
    folds = min(FOLDS, len(members))
    fold = {int(member): place % folds for place, member in enumerate(dealt)}
    of_enrolled, of_stranger = (
        np.asarray([fold[int(member)] for member in asked.classes]) for asked in (enrolled, strangers)
    )
    out = []
    for share in shares:
        thresholds = np.asarray(
            [threshold_at(strangers.scores[(of_stranger != number) | (folds == 1)], share) for number in range(folds)]
        )
        passed = strangers.scores >= thresholds[of_stranger]
        refused = enrolled.scores < thresholds[of_enrolled]
        threshold = threshold_at(strangers.scores, share)
        out.append(Rate(share, threshold, share_of(passed, strangers), share_of(refused, enrolled)))
    return tuple(out)


def auroc_of(enrolled: Asked, strangers: Asked, draws: int = 500, seed: int = 0) -> Share:
    """AUROC and its 95 % interval for other classes: percentiles over classes drawn anew, with all their queries."""
    members, places = np.unique(np.concatenate([enrolled.classes, strangers.classes]), return_inverse=True)
    of_enrolled, of_stranger = np.split(places, [len(enrolled.classes)])
    won = np.zeros((len(members), len(members)))  # [class enrolled, class of the stranger]
    for stranger in np.unique(of_stranger):
        above = _above(enrolled.scores, strangers.scores[of_stranger == stranger])
        won[:, stranger] = np.bincount(of_enrolled, above, len(members)) * np.count_nonzero(of_stranger == stranger)
    asked = np.outer(*(np.bincount(of, minlength=len(members)) for of in (of_enrolled, of_stranger)))
    chances = np.full(len(members), 1 / len(members))
    weights = np.random.default_rng(seed).multinomial(len(members), chances, draws).astype(float)
    pairs = np.einsum("bc,cd,bd->b", weights, asked, weights)
    found = np.einsum("bc,cd,bd->b", weights, won, weights)[pairs > 0] / pairs[pairs > 0]
    low, high = np.quantile(found, (0.025, 0.975)) if len(found) else (0.0, 1.0)
    value = auroc(enrolled.scores, strangers.scores)
    return Share(value, min(float(low), value), max(float(high), value))
