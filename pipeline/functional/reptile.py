"""Reptile's inner loop (Nichol et al. 2018): TensorFlow's Adam as a function of its moments, minibatches of a small
set, and the penalty that keeps the weights of several tasks together (weight clustering, Goldblum et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.functional.flat import Shapes, unflatten
from pipeline.functional.losses import PADDING, labelled

EPS = 1e-8
TINY = 1e-24  # of a squared filter norm: a filter of zeros has no direction


class Moments(NamedTuple):
    """What Adam (Kingma & Ba 2015) remembers of the gradients [..., P] it has seen."""

    first: Tensor | None  # [..., P]; None where beta1 is 0 and the first moment is the gradient itself
    second: Tensor  # [..., P]
    steps: Tensor  # int64 scalar

    def expand(self, tasks: int) -> Moments:
        """The same moments for each of so many tasks: [P] to [tasks, P]."""
        first = None if self.first is None else self.first.expand(tasks, -1)
        return Moments(first, self.second.expand(tasks, -1), self.steps)

    def of_task(self, task: int) -> Moments:
        """[T, P] to [1, P]."""
        first = None if self.first is None else self.first[task : task + 1]
        return Moments(first, self.second[task : task + 1], self.steps)

    @staticmethod
    def join(tasks: Sequence[Moments]) -> Moments:
        """What :meth:`of_task` took apart, after as many steps of each."""
        firsts = [m.first for m in tasks if m.first is not None]
        return Moments(torch.cat(firsts) if firsts else None, torch.cat([m.second for m in tasks]), tasks[0].steps)


def adam_step(moments: Moments, gradient: Tensor, lr: float, beta1: float, beta2: float) -> tuple[Moments, Tensor]:
    """The moments after a gradient [..., P], and the change [..., P] that is to be subtracted::

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        change = lr sqrt(1 - beta2^t) / (1 - beta1^t)  m / (sqrt(v) + 1e-8)

    PyTorch adds its epsilon to sqrt(v / (1 - beta2^t)) instead, so that there a small gradient moves less at first.
    """
    steps = moments.steps + 1
    first = gradient if moments.first is None else moments.first * beta1 + gradient * (1 - beta1)
    second = moments.second * beta2 + gradient.square() * (1 - beta2)
    t = steps.double()
    rate = lr * torch.sqrt(1 - beta2**t) / (1 - beta1**t)
    kept = None if moments.first is None else first
    return Moments(kept, second, steps), rate.to(gradient.dtype) * first / (second.sqrt() + EPS)


def consecutive(size: int, batch: int, batches: int, generator: torch.Generator | None = None) -> Tensor:
    """Indices [batches, batch] into ``size`` items: the set is shuffled again and again into one endless row, which is
    cut into batches, so that what remains of one shuffle goes into a batch with the beginning of the next."""
    rounds = -(-batch * batches // size)
    row = torch.cat([torch.randperm(size, generator=generator) for _ in range(max(1, rounds))])
    return row[: batch * batches].view(batches, batch)


def task_minibatches(labels: Tensor, batch: int, batches: int, seed: int | None = None) -> Tensor:
    """Minibatches of every task: indices [batches, T, batch] into items with labels [T, N], padding left out.

    Args:
        seed: every task's shuffles begin from it, so that they do not depend on the other tasks; None: they come from
            PyTorch's global generator.
    """
    first = (labels == PADDING).byte().argsort(dim=1, stable=True)  # of every task: what is labelled, then the padding
    drawn = []
    for size in labelled(labels).tolist():
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        drawn.append(consecutive(size, batch, batches, generator))
    index = torch.stack(drawn, dim=1).to(labels.device)
    return first.expand(batches, *first.shape).gather(2, index)


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
