"""Adam (Kingma & Ba 2015) as a function of its moments, in the form of TensorFlow's optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-8


class Moments(NamedTuple):
    """What Adam remembers of the gradients [..., P] it has seen."""

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
