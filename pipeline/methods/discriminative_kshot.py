"""Discriminative k-shot learning using probabilistic models (Bauer, Rojas-Carulla, Swiatkowski et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.functional.gram import linear_scores
from pipeline.functional.logistic import expected_log_probabilities, fit_softmax, score_covariance
from pipeline.functional.losses import PADDING
from pipeline.methods.base import State
from pipeline.methods.head import ClassicalMethod
from pipeline.nets.by_name import choose


class DiscriminativeKShot(ClassicalMethod):
    """Classical training of a softmax, whose weights are then evidence of what the weights of new classes are like.

    A Gaussian is fitted to the weight vectors of the training classes; it is the prior of a new class's vector, and the
    support images' softmax the likelihood. Biases are the weights of an appended feature of 1. A state answers among
    the new classes.

    Args:
        backbone: the features, fixed after training.
        prior: covariance of the Gaussian: "isotropic", one variance for all directions (published: 56.3 / 73.9 / 78.5
            on mini-ImageNet with 1 / 5 / 10 shots and ResNet-34); "diagonal"; or "full". The latter two are the most
            probable under a normal-inverse-Wishart prior around the isotropic one.
        prior_strength: how many weight vectors that prior is worth (diagonal, full).
        prior_scale: multiplies the covariance; 1 is what was fitted.
        inference: "map": the most probable weights. "laplace": probabilities averaged over a Gaussian around them, of
            the curvature there: about as accurate and better calibrated.
        samples: of that average, drawn once and for all; each counts with its negative.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        prior: str = "isotropic",
        prior_strength: float = 64.0,
        prior_scale: float = 1.0,
        inference: str = "map",
        samples: int = 128,
    ) -> None:
        super().__init__(backbone)
        if prior_strength <= 0 or prior_scale <= 0 or samples < 1:
            raise PipelineError(
                f"prior_strength={prior_strength}, prior_scale={prior_scale} and samples={samples} must be above zero"
            )
        self.prior = choose("prior", prior, tuple(PRIORS))
        self.prior_strength, self.prior_scale = prior_strength, prior_scale
        self.inference = choose("inference", inference, ("map", "laplace"))
        self.samples = samples
        self.head = nn.Linear(self.width, classes)

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor, way: int) -> State:
        """The posterior's mode as weights [T, way, D + 1] and, for Laplace, what its covariance is computed from."""
        prior = self._prior()
        features = _with_one(features) * (labels != PADDING).unsqueeze(-1)
        spread = prior.covary(features)
        fit = fit_softmax(spread @ features.mT, labels, way)
        state = {"weights": (prior.mean + fit.alpha @ spread).to(self.head.weight.dtype)}
        if self.inference == "laplace":
            state |= {"spread": spread, "curvatures": fit.curvatures, "total": fit.total}
        return state

    def scores(self, state: State, query: Tensor) -> Tensor:
        """Logits; for Laplace log-probabilities."""
        features = _with_one(query)
        scores = linear_scores(features, state["weights"].double())
        if self.inference == "map":
            return scores.to(state["weights"].dtype)
        own = (self._prior().covary(features) * features).sum(-1)
        cross = features @ state["spread"].mT
        covariances = score_covariance(state["curvatures"], state["total"], cross, own)
        return expected_log_probabilities(scores, covariances, self.samples).to(state["weights"].dtype)

    def base_scores(self, features: Tensor) -> Tensor:
        return self.head(features)

    def _prior(self) -> GaussianPrior:
        weights = torch.cat([self.head.weight, self.head.bias.unsqueeze(-1)], dim=-1).detach().double()
        return PRIORS[self.prior](weights, self.prior_strength, self.prior_scale)


def _with_one(features: Tensor) -> Tensor:
    """[T, N, D] -> float64 [T, N, D + 1]."""
    return nn.functional.pad(features.double(), (0, 1), value=1.0)


@dataclass(frozen=True)
class GaussianPrior:
    """N(mean, diag(variances) + B^T B), whose covariance is never written out: features can be thousands wide."""

    mean: Tensor  # [D]
    variances: Tensor  # [D]
    directions: Tensor | None = None  # B, [R, D]

    def covary(self, features: Tensor) -> Tensor:
        """Features [..., D] times the covariance: [..., D]."""
        varied = features * self.variances
        return varied if self.directions is None else varied + features @ self.directions.mT @ self.directions


def isotropic(weights: Tensor, strength: float, scale: float) -> GaussianPrior:
    """One variance for all directions, the mean squared deviation of weights [classes, D]."""
    mean, deviations = _centred(weights)
    return GaussianPrior(mean, scale * deviations.square().mean().expand_as(mean))


def diagonal(weights: Tensor, strength: float, scale: float) -> GaussianPrior:
    """A variance for each direction, drawn to the isotropic one as if ``strength`` more vectors had been seen."""
    mean, deviations = _centred(weights)
    overall = deviations.square().mean()
    variances = (strength * overall + deviations.square().sum(0)) / (strength + len(weights))
    return GaussianPrior(mean, scale * variances)


def full(weights: Tensor, strength: float, scale: float) -> GaussianPrior:
    """The mode under a normal-inverse-Wishart prior with a flat mean, scale matrix strength s I and
    strength - D - 2 degrees of freedom: (strength s I + sum of deviations' outer products) / (strength + classes).
    """
    mean, deviations = _centred(weights)
    total = strength + len(weights)
    overall = deviations.square().mean()
    variances = (scale * strength * overall / total).expand_as(mean)
    return GaussianPrior(mean, variances, (scale / total) ** 0.5 * deviations)


def _centred(weights: Tensor) -> tuple[Tensor, Tensor]:
    mean = weights.mean(0)
    return mean, weights - mean


PRIORS: dict[str, Callable[[Tensor, float, float], GaussianPrior]] = {
    "isotropic": isotropic,
    "diagonal": diagonal,
    "full": full,
}
