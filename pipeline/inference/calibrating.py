"""Calibration: where 'unknown' begins, found on episodes with enrolled classes and strangers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.inference.background import Background
from pipeline.inference.calibration import Calibration, CalibrationPoint
from pipeline.inference.rates import Asked, auroc, equal_error_rate, measure_rates, oscr
from pipeline.inference.scores import OF_BACKGROUND, SCORES, Evidence, gather_evidence, score_queries
from pipeline.inference.temperature import fit_temperature, reliability
from pipeline.methods.base import Method, one_task_at_once

ClassImages = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Class numbers int64 [N] and image numbers within the class int64 [N] to uint8 images [N, C, H, W]."""

SHARES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)  # of strangers that pass
WAYS, SHOTS, QUERIES, TARGET = (1, 5, 20, 50), (1, 2, 5), 1000, 0.05
_PIXELS_AT_ONCE = 2**20


class Asking(NamedTuple):
    """A method and the images of classes, in the form that it takes them."""

    method: Method
    preprocess: nn.Module
    images: ClassImages
    counts: np.ndarray  # int64 [classes] images of the classes that an episode enrols, or has as strangers


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
    ways: Sequence[int] = WAYS,
    shots: Sequence[int] = SHOTS,
    queries: int = QUERIES,
    target: float = TARGET,
    seed: int = 0,
    split: str = "val",
    background: Background | None = None,
) -> Calibration | None:
    """Compare the scores, keep the one that tells strangers best, and set its thresholds.

    An episode enrols ``way`` classes by ``shot`` images each and asks about other images of these classes and, as
    often, about images of classes that are not enrolled. The score is the one with the highest mean AUROC of all
    points, ties and all; thresholds are set on all of a point's strangers, and what they do is measured on classes that
    they were not set on (:func:`pipeline.inference.rates.measure_rates`). Probabilities get the temperature at which
    the enrolled queries' answers are most likely.

    Args:
        method, preprocess: the model, in evaluation mode on its device.
        images: the classes' images, see :data:`ClassImages`; classes must be unseen in training.
        counts: [classes] images of every class.
        ways, shots: the grid. A way that leaves fewer than a quarter of the classes as strangers is reduced to the
            largest that leaves them; a shot that leaves no query image is left out. A method with a fixed way has it
            as its only one.
        queries: least number of stranger queries a point, and of enrolled ones but where they are of few classes.
        target: share of strangers that pass where no other is asked for, 0 < target < 1.
        seed: equal seeds draw equal episodes.
        split: the name of the split, to be told with the figures.
        background: the training classes, see :func:`pipeline.inference.background.survey`; kept where the score is of
            it.

    Returns:
        None when the split is too small for any point.
    """
    if not 0 < target < 1:
        raise PipelineError(f"target={target}: a false-acceptance rate lies between 0 and 1")
    ask = Asking(method, preprocess, images, np.asarray(counts, dtype=np.int64))
    was_training = method.training
    method.eval()
    try:
        asked = [
            ask_strangers(ask, way, shot, queries, seed, background)
            for way, shot in grid_of(ask.counts, method.fixed_way, ways, shots)
        ]
    finally:
        method.train(was_training)
    return conclude(asked, target, seed, split, background)


def grid_of(
    counts: np.ndarray, fixed_way: int | None, ways: Sequence[int] = WAYS, shots: Sequence[int] = SHOTS
) -> list[tuple[int, int]]:
    """The points (way, shot) of the grid that classes of so many images can serve."""
    return [(way, shot) for shot in sorted(set(shots)) for way in ways_of(ways, int((counts > shot).sum()), fixed_way)]


def conclude(
    asked: Sequence[Answered], target: float, seed: int, split: str, background: Background | None
) -> Calibration | None:
    """What :func:`calibrate` makes of the answers at the points of its grid; None where there are none."""
    if not asked:
        return None
    several = [one for one in asked if one.way > 1] or asked
    means = {name: float(np.mean([one.auroc(name) for one in several])) for name in several[0].scores}
    best = sorted(means, key=lambda name: (-means[name], list(SCORES).index(name)))
    points = tuple(_point(one, best, target, seed) for one in asked)
    kept = background if any(point.score in OF_BACKGROUND for point in points) else None
    return Calibration(target, split, seed, points, kept)


def ways_of(ways: Sequence[int], classes: int, fixed: int | None) -> list[int]:
    """The numbers of classes that a split of so many can enrol, with a quarter left as strangers."""
    largest = classes - max(1, classes // 4)
    if fixed is not None:
        return [fixed] if fixed <= largest else []
    return sorted({min(way, largest) for way in ways if min(way, largest) >= 1})


@dataclass(frozen=True)
class Answered:
    """The queries of all episodes of one shape, N of enrolled classes and M strangers, as every score has them."""

    way: int
    shot: int
    temperature: float
    right: np.ndarray  # bool [N] whether an enrolled query's answer is its class
    scores: Mapping[str, tuple[Asked, Asked]]  # enrolled queries and strangers
    unreliable: tuple[float, float]  # calibration error of the stated probabilities, without temperature and with

    def auroc(self, score: str) -> float:
        enrolled, strangers = self.scores[score]
        return auroc(enrolled.scores, strangers.scores)


def ask_strangers(
    ask: Asking,
    way: int,
    shot: int,
    queries: int,
    seed: int,
    background: Background | None,
    temperature: float | None = None,
    passers: np.ndarray | None = None,
) -> Answered:
    """Ask episodes of ``way`` classes by ``shot`` images about other images of them and about strangers.

    Args:
        queries: of strangers, at least, and of enrolled classes but where they are fewer than five.
        temperature: of the probabilities; by default the best for the enrolled queries.
        passers: int64 [P, 2], class and image numbers of strangers beside them, each of a class of its own; an episode
            asks about as many of them as of the classes that it did not enrol.
    """
    rng, counts = np.random.default_rng([seed, way, shot]), ask.counts
    usable = np.flatnonzero(counts > shot)
    each = int(min(2, counts[usable].min() - shot))  # queries per class: few, so that many classes are drawn
    strangers = min(max(way, 5), len(usable) - way)
    episodes = max(2, math.ceil(queries / (strangers * each)))

    def plan() -> tuple[np.ndarray, np.ndarray]:
        """The images of an episode [way * shot + queries, 2], class and number within it: support, enrolled queries,
        strangers; and by what the class and image of a query [queries, 2] are told apart."""
        drawn = rng.permutation(usable)[: way + strangers]
        numbers = np.stack([rng.permutation(counts[c])[: shot + each] for c in drawn])  # [way + strangers, shot + each]
        support = np.stack([np.repeat(drawn[:way], shot), numbers[:way, :shot].ravel()], axis=1)
        images = queries = np.stack([np.repeat(drawn, each), numbers[:, shot:].ravel()], axis=1)
        if passers is not None:
            chosen = rng.permutation(len(passers))[: strangers * each]
            images = np.concatenate([images, passers[chosen]])
            apart = np.stack([len(counts) + chosen, np.zeros_like(chosen)], axis=1)
            queries = np.concatenate([queries, apart])
        return np.concatenate([support, images]), queries

    plans = [plan() for _ in range(episodes)]
    shown, queried = (np.stack(part) for part in zip(*plans, strict=True))  # [episodes, images or queries, 2]
    told = list(_evidence(ask, shown, way, shot, background))
    inside, labels = way * each, np.repeat(np.arange(way), each)
    logits = np.concatenate([one.logits.numpy() for one in told])  # [episodes, queries, way]
    if not np.isfinite(logits).all():
        raise PipelineError(
            f"the model gives scores that are NaN or infinite ({way} classes, {shot} images): train it again"
        )
    if temperature is None:
        temperature = fit_temperature(logits[:, :inside].reshape(-1, way), np.tile(labels, episodes))
    enrolled = shown[:, : way * shot : shot, 0]  # [episodes, way]
    answers = np.take_along_axis(enrolled, logits.argmax(-1), axis=1)
    scores = {}
    for name in SCORES:
        found = [score_queries(name, one, temperature) for one in told]
        values = np.concatenate([one.double().numpy() for one in found if one is not None] or [np.empty((0, 0))])
        if len(values) == episodes and np.isfinite(values).all():
            kinds = slice(inside), slice(inside, None)
            mine, others = (_asked(values[:, kind], queried[:, kind], answers[:, kind]) for kind in kinds)
            scores[name] = (mine, others)
    right = (logits[:, :inside].argmax(-1) == labels).ravel()
    stated = [torch.from_numpy(logits[:, :inside] / t).softmax(-1).amax(-1).ravel() for t in (1, temperature)]
    before, after = (reliability(one.numpy(), right)["error"] for one in stated)
    return Answered(way, shot, temperature, right, scores, (before, after))


def _asked(scores: np.ndarray, queried: np.ndarray, answers: np.ndarray) -> Asked:
    images = queried.reshape(-1, 2)
    return Asked(scores.ravel(), images[:, 0], answers.ravel(), len(np.unique(images, axis=0)))


def _point(found: Answered, best: Sequence[str], target: float, seed: int) -> CalibrationPoint:
    areas = {name: found.auroc(name) for name in found.scores}
    one = max(areas, key=lambda name: areas[name]) if found.way == 1 else ""
    score = one or next(name for name in best if name in areas)
    enrolled, strangers = found.scores[score]
    rates = measure_rates(enrolled, strangers, sorted({*SHARES, target}), seed)
    at = next(rate for rate in rates if rate.asked == target)
    return CalibrationPoint(
        way=found.way,
        shot=found.shot,
        threshold=at.threshold,
        false_acceptance=at.passed.value,
        false_rejection=at.refused.value,
        equal_error=equal_error_rate(enrolled.scores, strangers.scores),
        accuracy=float(np.mean(found.right)),
        enrolled_queries=enrolled.scores.size,
        stranger_queries=strangers.scores.size,
        score=score,
        temperature=found.temperature,
        auroc=areas,
        oscr=oscr(enrolled.scores, found.right, strangers.scores),
        rates=rates,
        stranger_images=strangers.distinct,
        stranger_classes=len(np.unique(strangers.classes)),
    )


def _evidence(ask: Asking, shown: np.ndarray, way: int, shot: int, background: Background | None) -> Iterator[Evidence]:
    """What the model says about the queries of episodes that show images [episodes, images, 2], on the CPU, several
    episodes at a time."""
    method = ask.method
    device = next(method.parameters(), torch.empty(0)).device
    support = way * shot
    labels = torch.arange(way, device=device).repeat_interleave(shot)[None]
    together = 1
    start = 0
    while start < len(shown):
        part = shown[start : start + together]
        pixels = torch.from_numpy(ask.images(*part.reshape(-1, 2).T)).to(device)
        if not one_task_at_once(method):
            together = max(1, _PIXELS_AT_ONCE // (pixels.shape[-1] * pixels.shape[-2] * shown.shape[1]))
        batch = ask.preprocess(pixels.unflatten(0, (len(part), -1)))
        with torch.no_grad():
            state = method.adapt(batch[:, :support], labels.expand(len(part), -1), way)
            found = gather_evidence(method, state, batch[:, support:], background)
        yield replace(found, **{name: value.cpu() for name, value in vars(found).items() if isinstance(value, Tensor)})
        start += len(part)
