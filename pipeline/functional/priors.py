"""Gaussians fitted to the weight vectors of known classes, as a prior of those of new ones (Bauer et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


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
