"""What tells a query of an enrolled class from a stranger: several scores, of all that a model says about it.

Every score is high for a query that belongs to an enrolled class. None is best for every method: calibration compares
them and keeps one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.inference.background import Background
from pipeline.methods.base import Method, State
from pipeline.methods.head import HeadMethod


@dataclass(frozen=True)
class Evidence:
    """What a model says about the queries of T tasks."""

    logits: Tensor  # float32 [T, Q, way]
    distances: Tensor | None = None  # [T, Q, way] to the enrolled classes, where the method measures some
    background: Tensor | None = None  # [T, Q, K] the training classes' logits
    cohort: Tensor | None = None  # [T, K, way] the enrolled classes' logits for the training classes' means


def gather_evidence(method: Method, state: State, query: Tensor, background: Background | None) -> Evidence:
    """The model's answer to queries [T, Q, C, H, W], with what a score can use beside the logits."""
    if background is None or not isinstance(method, HeadMethod):
        logits = method.classify(state, query).float()
        return Evidence(logits, method.distances(logits))
    features = method.features(query)
    logits = method.scores(state, features).float()
    tasks, queries = features.shape[:2]
    means = background.means.to(features.device, features.dtype)
    of_training = method.scores(method.fit(*background.support(means)), features.flatten(0, 1)[None])
    return Evidence(
        logits,
        method.distances(logits),
        of_training.float()[0].unflatten(0, (tasks, queries)),
        method.scores(state, means.expand(tasks, *means.shape)).float(),
    )


def _margin(given: Evidence, temperature: float) -> Tensor:
    """The largest logit minus the next."""
    first, second = given.logits.topk(2, dim=-1).values.unbind(-1)
    return first - second


def _ratio(given: Evidence, temperature: float) -> Tensor | None:
    """Minus the distance to the nearest class over the distance to the next (Mendes Junior et al. 2017)."""
    if given.distances is None:
        return None
    first, second = given.distances.clamp(min=0).topk(2, dim=-1, largest=False).values.unbind(-1)
    return -first / second.clamp(min=torch.finfo(second.dtype).tiny)


def _background(given: Evidence, temperature: float) -> Tensor | None:
    """The largest logit minus the mean of the training classes', which stand for all classes that are not enrolled."""
    if given.background is None:
        return None
    return given.logits.amax(-1) - given.background.mean(-1)


def _normalised(given: Evidence, temperature: float) -> Tensor | None:
    """The answer's logit in standard deviations above what training classes get: of the same query, and of the same
    enrolled class, averaged (symmetric score normalisation, Kenny 2010): a class from one odd image draws no strangers.
    """
    if given.background is None or given.cohort is None:
        return None
    answer = given.logits.argmax(-1, keepdim=True)
    logit = given.logits.gather(-1, answer)
    least = torch.finfo(logit.dtype).tiny
    of_query = _mean_and_deviation(given.background)
    of_class = [x.mT.expand(given.logits.shape).gather(-1, answer) for x in _mean_and_deviation(given.cohort.mT)]
    parts = [(logit - mean) / deviation.clamp(min=least) for mean, deviation in (of_query, of_class)]
    return (sum(parts) / 2).squeeze(-1)  # type: ignore[union-attr]


def _mean_and_deviation(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(-1, keepdim=True), x.std(-1, keepdim=True, correction=0)


SCORES: dict[str, Callable[[Evidence, float], Tensor | None]] = {
    # Unlike a probability, a logit keeps the distance of a query that is far from all classes.
    "logit": lambda given, _: given.logits.amax(-1),
    "probability": lambda given, t: torch.softmax(given.logits / t, dim=-1).amax(-1),  # Hendrycks & Gimpel 2017
    "margin": _margin,
    "energy": lambda given, t: t * torch.logsumexp(given.logits / t, dim=-1),  # minus the free energy, Liu et al. 2020
    "ratio": _ratio,
    "background": _background,
    "normalised": _normalised,
}
OF_ONE_CLASS = ("logit", "energy", "background", "normalised")  # the others compare two enrolled classes
OF_BACKGROUND = ("background", "normalised")
MEANING = {
    "logit": "the largest logit",
    "probability": "the largest probability",
    "margin": "the largest logit minus the next",
    "energy": "the log-sum-exp of the logits",
    "ratio": "minus the distance to the nearest class over that to the next",
    "background": "the largest logit minus the training classes' mean logit",
    "normalised": "the largest logit in standard deviations above the training classes'",
}


def score_queries(name: str, given: Evidence, temperature: float) -> Tensor | None:
    """Scores float32 [T, Q] by the name in :data:`SCORES`; None where the model cannot tell what the score needs."""
    if given.logits.shape[-1] < 2 and name not in OF_ONE_CLASS:
        return None
    return SCORES[name](given, temperature)
