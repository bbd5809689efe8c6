"""Gradient descent as a function of its start: what MAML differentiates through."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
Loss = Callable[[Parameters], Tensor]
Gradient = Callable[[Loss, Parameters, bool], Parameters]
Result = TypeVar("Result", Tensor, dict[str, Tensor])


def descend(
    loss: Loss, parameters: Parameters, lr: float, steps: int, second_order: bool, gradient: Gradient
) -> Parameters:
    """theta_{j+1} = theta_j - lr grad L(theta_j), ``steps`` times.

    The result is a differentiable function of ``parameters``. With ``second_order`` that includes the inner gradients;
    without, they are constants, so that the outer gradient is the one at the adapted parameters (first-order MAML).
    """
    for _ in range(steps):
        gradients = gradient(loss, parameters, second_order)
        parameters = {name: value - lr * gradients[name] for name, value in parameters.items()}
    return parameters


def autograd_gradient(loss: Loss, parameters: Parameters, differentiable: bool) -> Parameters:
    """The gradient by ``torch.autograd``; zero for parameters that the loss does not use."""
    gradients = torch.autograd.grad(
        loss(parameters), list(parameters.values()), create_graph=differentiable, materialize_grads=True
    )
    return dict(zip(parameters, gradients, strict=True))


def func_gradient(loss: Loss, parameters: Parameters, differentiable: bool) -> Parameters:
    """The gradient by ``torch.func``, which ``vmap`` can batch."""
    gradients = torch.func.grad(loss)(parameters)
    return gradients if differentiable else {name: value.detach() for name, value in gradients.items()}


def loop_tasks(function: Callable[..., Result], *arguments: Tensor | dict[str, Tensor]) -> Result:
    """``function`` of every task in turn; tensors [T, ...] (or dictionaries of them) in, stacked again out."""
    first = arguments[0]
    tasks = len(first if isinstance(first, Tensor) else next(iter(first.values())))
    results = [function(*(_task(a, t) for a in arguments)) for t in range(tasks)]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return {key: torch.stack([r[key] for r in results]) for key in results[0]}


def vmap_tasks(function: Callable[..., Result], *arguments: Tensor | dict[str, Tensor]) -> Result:
    """``function`` of all tasks at once, as :func:`loop_tasks`."""
    return torch.func.vmap(function, randomness="different")(*arguments)


def _task(argument: Tensor | dict[str, Tensor], task: int) -> Tensor | dict[str, Tensor]:
    return argument[task] if isinstance(argument, Tensor) else {key: value[task] for key, value in argument.items()}
