"""The penalty that keeps the weights of several tasks together (weight clustering, Goldblum et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.functional.flat import Shapes, unflatten

TINY = 1e-24  # of a squared filter norm: a filter of zeros has no direction


def consensus_gradient(
    weights: Tensor, mean: Tensor, tasks: int, shapes: Shapes, distance: str, through_mean: bool
) -> tuple[Tensor, Tensor]:
    """R_i = d(theta_i, mean)^2 and its gradient in theta_i, for every task i (section 6).

    Args:
        weights: theta [T, P], of some of the tasks or of all.
        mean: [P], of the weights of all tasks.
        tasks: m, how many tasks ``mean`` is of.
        shapes: of the network's parameters, in the order in which they make up P.
        distance: one of ``DISTANCES``.
        through_mean: theta_i counts as a part of the mean, as the formula says: with ``l2`` the gradient is
            2 (1 - 1/m) (theta_i - mean). Otherwise the mean is a constant, and it is 2 (theta_i - mean).

    Returns:
        R [T] and the gradient [T, P].
    """
    here, mean = weights.detach(), mean.detach()

    def total(own: Tensor) -> tuple[Tensor, Tensor]:
        centre = mean + (own - here) / tasks if through_mean else mean.expand_as(own)
        squared = DISTANCES[distance](own, centre, shapes)
        return squared.sum(), squared

    gradient, squared = torch.func.grad(total, has_aux=True)(here)
    return squared, gradient


def l2(a: Tensor, b: Tensor, shapes: Shapes) -> Tensor:
    """||a - b||^2 of [T, P] and [T, P]: [T]."""
    return (a - b).square().sum(-1)


def filter_normalised(a: Tensor, b: Tensor, shapes: Shapes) -> Tensor:
    """As ``l2`` after every filter of ``a`` and of ``b`` is scaled to unit norm."""
    return _over_filters(a, b, shapes, lambda x, y: (x / _norm(x) - y / _norm(y)).square())


def filter_relative(a: Tensor, b: Tensor, shapes: Shapes) -> Tensor:
    """The difference of every filter in units of the filter's norm in ``b``: sum ||a_f - b_f||^2 / ||b_f||^2."""
    return _over_filters(a, b, shapes, lambda x, y: ((x - y) / _norm(y)).square())


DISTANCES: dict[str, Callable[[Tensor, Tensor, Shapes], Tensor]] = {
    "filter_normalised": filter_normalised,
    "filter_relative": filter_relative,
    "l2": l2,
}


def _over_filters(a: Tensor, b: Tensor, shapes: Shapes, square: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sum of ``square`` over filters [T, F, n]; vectors (biases, gains) have no filters and count plainly."""
    theirs = unflatten(b, shapes)
    total = a.new_zeros(a.shape[:-1])
    for name, x in unflatten(a, shapes).items():
        y = theirs[name]
        squares = square(x.flatten(2), y.flatten(2)) if x.ndim > 2 else (x - y).square()
        total = total + squares.flatten(1).sum(-1)
    return total


def _norm(filters: Tensor) -> Tensor:
    """[T, F, n] to [T, F, 1]."""
    return filters.square().sum(-1, keepdim=True).clamp(min=TINY).sqrt()
