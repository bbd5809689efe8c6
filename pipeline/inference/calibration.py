"""What calibration found: the score that tells strangers best, its thresholds, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from pipeline.errors import PipelineError
from pipeline.inference.background import Background
from pipeline.inference.rates import Rate, Share
from pipeline.inference.scores import OF_BACKGROUND, SCORES

REPORTED = (0.01, 0.05, 0.2)  # shares of strangers that pass, at which figures are told
FEWEST = 3  # strangers that a share has to mean: of so many, none passes in one validation of twenty


@dataclass(frozen=True)
class CalibrationPoint:
    """What was found for one number of enrolled classes and images per class, at the calibration's target."""

    way: int
    shot: int
    threshold: float
    false_acceptance: float  # share of strangers who are taken for an enrolled class
    false_rejection: float  # share of enrolled classes' queries that are called unknown
    equal_error: float  # where both shares are the same
    accuracy: float  # share of the enrolled classes' queries with the right class, before any is rejected
    enrolled_queries: int
    stranger_queries: int
    score: str = "logit"  # that the threshold is of, see pipeline.inference.scores
    temperature: float = 1.0  # of the softmax that makes probabilities
    auroc: Mapping[str, float] = field(default_factory=dict)  # of every score that was compared
    oscr: float | None = None  # of the score
    rates: tuple[Rate, ...] = ()  # of the score, for growing shares of strangers that pass
    stranger_images: int = 0  # different ones among the strangers
    stranger_classes: int = 0

    @property
    def least_share(self) -> float:
        """The least share of passing strangers that so many of them can tell."""
        return FEWEST / max(self.stranger_images, 1)

    def rate(self, share: float) -> Rate:
        """The threshold for a share of strangers that are to pass, between those that are stored.

        Raises:
            PipelineError: a share that this validation says nothing about.
        """
        if not self.rates:
            raise PipelineError(
                f"unknown.pass={share:g}: this model was calibrated by an earlier version, for one rate only; "
                "evaluate and register it again, or give a threshold"
            )
        if share < self.least_share:
            raise PipelineError(
                f"unknown.pass={share:g}: validation had {self.stranger_images} strangers, too few to tell a rate "
                f"under {math.ceil(1000 * self.least_share) / 1000:g}; give at least that"
            )
        low, high = self.rates[0].asked, self.rates[-1].asked
        if not low <= share <= high:
            raise PipelineError(f"unknown.pass={share:g}: give a share of strangers from {low:g} to {high:g}")
        asked = [rate.asked for rate in self.rates]
        place = int(np.searchsorted(asked, share))
        if asked[place] == share:
            return self.rates[place]
        before, after = self.rates[place - 1], self.rates[place]
        return _between(before, after, (share - before.asked) / (after.asked - before.asked))


def _between(a: Rate, b: Rate, part: float) -> Rate:
    def mixed(x: float, y: float) -> float:
        return x + part * (y - x)

    def shares(x: Share, y: Share) -> Share:
        return Share(mixed(x.value, y.value), mixed(x.low, y.low), mixed(x.high, y.high))

    threshold = mixed(a.threshold, b.threshold)
    return Rate(mixed(a.asked, b.asked), threshold, shares(a.passed, b.passed), shares(a.refused, b.refused))


@dataclass(frozen=True)
class Calibration:
    """A score and its thresholds over a grid of ways and shots."""

    target: float  # share of strangers that pass, unless another is asked for
    split: str
    seed: int
    points: tuple[CalibrationPoint, ...]
    background: Background | None = None  # where the score needs the training classes

    def nearest(self, way: int, shot: float) -> CalibrationPoint:
        """The point nearest in (log way, log shot): the score's distribution moves with the ratios of both.

        One class alone has scores of its own, which no other number of classes has anything to say about.
        """
        like = [p for p in self.points if (p.way == 1) == (way == 1)] or self.points
        return min(like, key=lambda p: (math.log(p.way / way) ** 2 + math.log(p.shot / shot) ** 2, p.way, p.shot))

    def to_dict(self) -> dict[str, Any]:
        """Plain values: of a calibration of old, which has one rate, the same as were read."""
        points = [asdict(point) for point in self.points]
        if not any(point.rates for point in self.points):
            points = [{key: point[key] for key in _OLD} for point in points]
        found = {"target": self.target, "split": self.split, "seed": self.seed, "points": points}
        return found if self.background is None else {**found, "background": self.background.to_dict()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Calibration:
        """Inverse of :meth:`to_dict`; raises ValueError, TypeError or KeyError for anything else."""
        points = tuple(_point_from(point) for point in content["points"])
        if not points:
            raise ValueError("a calibration without points")
        target = _number(content["target"])
        if any(point.rates and target not in [rate.asked for rate in point.rates] for point in points):
            raise ValueError(f"no rate for its target, {target:g}")
        background = content.get("background")
        if background is None and any(point.score in OF_BACKGROUND for point in points):
            raise ValueError("its score needs a background, which is not there")
        return cls(
            target,
            str(content["split"]),
            int(content["seed"]),
            points,
            None if background is None else Background.from_dict(background),
        )


_OLD = [entry.name for entry in fields(CalibrationPoint)][:9]  # of the first format


def _point_from(content: dict[str, Any]) -> CalibrationPoint:
    rates = tuple(
        Rate(_number(r["asked"]), _number(r["threshold"]), _share_from(r["passed"]), _share_from(r["refused"]))
        for r in content.get("rates", [])
    )
    areas = {str(name): _number(value) for name, value in content.get("auroc", {}).items()}
    point = CalibrationPoint(**{**content, "rates": rates, "auroc": areas})
    for name in (*_OLD, "temperature", "stranger_images", "stranger_classes"):
        _number(getattr(point, name), name)
    if point.way < 1 or point.shot < 1 or point.temperature <= 0:
        raise ValueError(f"calibration for {point.way} classes of {point.shot} images at {point.temperature}")
    if point.score not in SCORES:
        raise ValueError(f"calibration of the score {point.score!r}; there are {', '.join(SCORES)}")
    if [rate.asked for rate in rates] != sorted({rate.asked for rate in rates}):
        raise ValueError("rates that do not grow")
    return point


def _share_from(content: dict[str, Any]) -> Share:
    return Share(*(_number(content[key]) for key in ("value", "low", "high")))


def _number(value: Any, name: str = "rate") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"calibration {name} is {value!r}")
    return value
