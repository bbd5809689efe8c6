"""Where 'unknown' begins: thresholds on the score, set on episodes with enrolled classes and strangers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import PipelineError
from pipeline.inference.rates import equal_error_rate, error_rates, threshold_at
from pipeline.methods.base import Method

ClassImages = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Class numbers int64 [N] and image numbers within the class int64 [N] to uint8 images [N, C, H, W]."""

_PIXELS_AT_ONCE = 2**20


@dataclass(frozen=True)
class CalibrationPoint:
    """The threshold for one number of enrolled classes and images per class, and what it costs."""

    way: int
    shot: int
    threshold: float
    false_acceptance: float  # share of strangers who are taken for an enrolled class
    false_rejection: float  # share of enrolled classes' queries that are called unknown
    equal_error: float  # where both shares are the same
    accuracy: float  # share of the enrolled classes' queries with the right class, before any is rejected
    enrolled_queries: int
    stranger_queries: int


@dataclass(frozen=True)
class Calibration:
    """Thresholds at one false-acceptance rate over a grid of ways and shots."""

    target: float
    split: str
    seed: int
    points: tuple[CalibrationPoint, ...]

    def nearest(self, way: int, shot: float) -> CalibrationPoint:
        """The point nearest in (log way, log shot): the score's distribution moves with the ratios of both."""
        return min(
            self.points, key=lambda p: (math.log(p.way / way) ** 2 + math.log(p.shot / shot) ** 2, p.way, p.shot)
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "points": [asdict(point) for point in self.points]}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Calibration:
        """Inverse of :meth:`to_dict`; raises ValueError, TypeError or KeyError for anything else."""
        points = tuple(CalibrationPoint(**point) for point in content["points"])
        if not points:
            raise ValueError("a calibration without points")
        for point in points:
            for field in fields(point):
                value = getattr(point, field.name)
                if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    raise ValueError(f"calibration {field.name} is {value!r}")
            if point.way < 1 or point.shot < 1:
                raise ValueError(f"calibration for {point.way} classes of {point.shot} images")
        return cls(float(content["target"]), str(content["split"]), int(content["seed"]), points)


def class_images(
    gather: Callable[[np.ndarray], np.ndarray], starts: np.ndarray, quarter_turns: np.ndarray | None = None
) -> ClassImages:
    """Images by class from images by row.

    Args:
        gather: rows int64 [N] to uint8 [N, C, H, W].
        starts: int64 [classes], the first row of every class.
        quarter_turns: int64 [classes], how often every class is turned counter-clockwise; not at all by default.
    """

    def images(classes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        out = gather(starts[classes] + numbers)
        if quarter_turns is None:
            return out
        turns = quarter_turns[classes] % 4
        for turn in range(1, 4):
            chosen = np.flatnonzero(turns == turn)
            if len(chosen):
                out[chosen] = np.rot90(out[chosen], turn, axes=(2, 3))
        return out

    return images


def calibrate(
    method: Method,
    preprocess: nn.Module,
    images: ClassImages,
    counts: Sequence[int] | np.ndarray,
    *,
    ways: Sequence[int] = (5, 20, 50),
    shots: Sequence[int] = (1, 2, 5),
    queries: int = 1000,
    target: float = 0.05,
    seed: int = 0,
    split: str = "val",
) -> Calibration | None:
    """Set the threshold of every point of the grid that the classes can serve.

    An episode enrols ``way`` classes by ``shot`` images each and asks about other images of these classes and, as
    often, about images of classes that are not enrolled. The threshold is set on all of a point's scores; its error
    rates are measured on each half of the episodes at the threshold that the other half gives.

    Args:
        method, preprocess: the model, in evaluation mode on its device.
        images: the classes' images, see :data:`ClassImages`; classes must be unseen in training.
        counts: [classes] images of every class.
        ways, shots: the grid. A way that leaves fewer than a quarter of the classes as strangers is reduced to the
            largest that leaves them; a shot that leaves no query image is left out. A method with a fixed way has it
            as its only one.
        queries: least number of enrolled and of stranger queries a point.
        target: false-acceptance rate, 0 < target < 1.
        seed: equal seeds draw equal episodes.
        split: the name of the split, to be told with the figures.

    Returns:
        None when the split is too small for any point.
    """
    if not 0 < target < 1:
        raise PipelineError(f"target={target}: a false-acceptance rate lies between 0 and 1")
    counts = np.asarray(counts, dtype=np.int64)
    was_training = method.training
    method.eval()
    try:
        points = [
            _point(method, preprocess, images, np.flatnonzero(counts > shot), counts, way, shot, queries, target, seed)
            for shot in sorted(set(shots))
            for way in _ways(ways, int((counts > shot).sum()), method.fixed_way)
        ]
    finally:
        method.train(was_training)
    return Calibration(target, split, seed, tuple(points)) if points else None


def _ways(ways: Sequence[int], classes: int, fixed: int | None) -> list[int]:
    strangers = max(1, classes // 4)
    largest = classes - strangers
    if fixed is not None:
        return [fixed] if fixed <= largest else []
    return sorted({min(way, largest) for way in ways if min(way, largest) >= 1})


def _point(
    method: Method,
    preprocess: nn.Module,
    images: ClassImages,
    usable: np.ndarray,
    counts: np.ndarray,
    way: int,
    shot: int,
    queries: int,
    target: float,
    seed: int,
) -> CalibrationPoint:
    rng = np.random.default_rng([seed, way, shot])
    each = int(min(2, counts[usable].min() - shot))  # queries per class: few, so that many classes are drawn
    strangers = min(way, len(usable) - way)
    episodes = max(2, math.ceil(queries / (strangers * each)))
    plans = [_plan(rng, usable, counts, way, strangers, shot, each) for _ in range(episodes)]
    inside, outside, right = [], [], []
    for logits in _logits(method, preprocess, images, plans, way, shot):
        enrolled = logits[: way * each]
        inside.append(enrolled.max(axis=1))
        outside.append(logits[way * each :].max(axis=1))
        right.append(enrolled.argmax(axis=1) == np.repeat(np.arange(way), each))
    enrolled_scores, stranger_scores = np.stack(inside).astype(np.float64), np.stack(outside).astype(np.float64)
    if not (np.isfinite(enrolled_scores).all() and np.isfinite(stranger_scores).all()):
        raise PipelineError(
            f"the model gives scores that are NaN or infinite ({way} classes, {shot} images): train it again"
        )
    false_acceptance, false_rejection = _cross_measured(enrolled_scores, stranger_scores, target)
    return CalibrationPoint(
        way=way,
        shot=shot,
        threshold=threshold_at(stranger_scores.ravel(), target),
        false_acceptance=false_acceptance,
        false_rejection=false_rejection,
        equal_error=equal_error_rate(enrolled_scores.ravel(), stranger_scores.ravel()),
        accuracy=float(np.mean(right)),
        enrolled_queries=enrolled_scores.size,
        stranger_queries=stranger_scores.size,
    )


def _plan(
    rng: np.random.Generator,
    usable: np.ndarray,
    counts: np.ndarray,
    way: int,
    strangers: int,
    shot: int,
    each: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Class and image numbers, each [way * shot + (way + strangers) * each]: support, enrolled queries, strangers."""
    drawn = rng.permutation(usable)[: way + strangers]
    numbers = np.stack([rng.permutation(counts[c])[: shot + each] for c in drawn])  # [way + strangers, shot + each]
    classes = np.concatenate([np.repeat(drawn[:way], shot), np.repeat(drawn, each)])
    return classes, np.concatenate([numbers[:way, :shot].ravel(), numbers[:, shot:].ravel()])


def _logits(
    method: Method,
    preprocess: nn.Module,
    images: ClassImages,
    plans: list[tuple[np.ndarray, np.ndarray]],
    way: int,
    shot: int,
) -> Iterator[np.ndarray]:
    """Logits [queries, way] of every plan, several episodes at a time."""
    device = next(method.parameters()).device
    support = way * shot
    labels = torch.arange(way, device=device).repeat_interleave(shot)[None]
    together = 1
    start = 0
    while start < len(plans):
        part = plans[start : start + together]
        classes, numbers = (np.concatenate([plan[i] for plan in part]) for i in (0, 1))
        pixels = torch.from_numpy(images(classes, numbers)).to(device)
        together = max(1, _PIXELS_AT_ONCE // (pixels.shape[-1] * pixels.shape[-2] * len(plans[0][0])))
        batch = preprocess(pixels.unflatten(0, (len(part), -1)))
        with torch.no_grad():
            state = method.adapt(batch[:, :support], labels.expand(len(part), -1), way)
            logits = method.classify(state, batch[:, support:])
        yield from logits.float().cpu().numpy()
        start += len(part)


def _cross_measured(enrolled: np.ndarray, strangers: np.ndarray, target: float) -> tuple[float, float]:
    """Error rates of scores [episodes, queries] at thresholds that were set on other episodes."""
    accepted, rejected = 0.0, 0.0
    for half in (0, 1):
        threshold = threshold_at(strangers[1 - half :: 2].ravel(), target)
        false_acceptance, false_rejection = error_rates(enrolled[half::2], strangers[half::2], threshold)
        accepted += false_acceptance * strangers[half::2].size
        rejected += false_rejection * enrolled[half::2].size
    return accepted / strangers.size, rejected / enrolled.size
