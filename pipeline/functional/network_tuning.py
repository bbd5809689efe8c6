"""Fine-tuning of a whole network as a function of its weights: for one task, to be mapped over tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.functional.inner_loop import Parameters

Loss = Callable[[Parameters], tuple[Tensor, Parameters]]  # a scalar, and what else comes out of the forward pass
BETAS, EPS = (0.9, 0.999), 1e-8


class Moments(NamedTuple):
    """Running averages of the gradient and of its square, by name of the parameter."""

    first: Parameters
    second: Parameters
    steps: int

    @classmethod
    def zeros(cls, parameters: Parameters) -> Moments:
        first, second = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
        return cls(first, second, 0)


def gradient(loss: Loss, parameters: Parameters, mapped: bool) -> tuple[Parameters, Parameters]:
    """The gradient of ``loss`` and what else it returns, as values without a graph.

    Args:
        mapped: whether this runs under ``vmap``.
    """
    if mapped:
        found: tuple[Parameters, Parameters] = torch.func.grad(loss, has_aux=True)(parameters)
        return found
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        value, other = loss(leaves)
        gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True)), {name: value.detach() for name, value in other.items()}


def sgd_step(parameters: Parameters, gradients: Parameters, lr: float) -> Parameters:
    return {name: value - lr * gradients[name] for name, value in parameters.items()}


def adam_step(parameters: Parameters, gradients: Parameters, moments: Moments, lr: float) -> tuple[Parameters, Moments]:
    """A step of Adam (Kingma & Ba 2015) in PyTorch's form, epsilon beside the corrected root::

    m = .9 m + .1 g    v = .999 v + .001 g^2    theta -= lr m / (1 - .9^t) / (sqrt(v / (1 - .999^t)) + 1e-8)
    """
    steps, (beta1, beta2) = moments.steps + 1, BETAS
    first = {n: beta1 * m + (1 - beta1) * gradients[n] for n, m in moments.first.items()}
    second = {n: beta2 * v + (1 - beta2) * gradients[n].square() for n, v in moments.second.items()}
    size, root = lr / (1 - beta1**steps), (1 - beta2**steps) ** 0.5
    moved = {n: p - size * first[n] / (second[n].sqrt() / root + EPS) for n, p in parameters.items()}
    return moved, Moments(first, second, steps)
