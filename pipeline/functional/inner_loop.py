"""What inner loops share: gradients at the weights of one task, and how tasks are gone through."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
Loss = Callable[[Parameters], tuple[Tensor, dict[str, Tensor]]]  # a scalar, and what else comes of the forward pass
Result = TypeVar("Result", Tensor, dict[str, Tensor])


def gradient(
    loss: Loss, parameters: Parameters, mapped: bool, differentiable: bool = False
) -> tuple[Parameters, dict[str, Tensor]]:
    """The gradient of ``loss``, zero for parameters that it does not use, and what else it returns.

    Args:
        mapped: whether this runs under ``vmap``.
        differentiable: both are functions of ``parameters``; otherwise they are constants.
    """
    if mapped:
        gradients, other = torch.func.grad(loss, has_aux=True)(parameters)
    else:
        leaves = {
            name: value if differentiable and value.requires_grad else value.detach().requires_grad_()
            for name, value in parameters.items()
        }
        with torch.enable_grad():
            value, other = loss(leaves)
        found = torch.autograd.grad(value, [*leaves.values()], create_graph=differentiable, materialize_grads=True)
        gradients = dict(zip(parameters, found, strict=True))
    if differentiable:
        return gradients, other
    return {name: g.detach() for name, g in gradients.items()}, {name: x.detach() for name, x in other.items()}


@contextmanager
def out_of_inference(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Within: gradients can be taken of functions of these tensors, also where ``torch.inference_mode`` is on."""
    with torch.inference_mode(False):
        yield [tensor.clone() if tensor.is_inference() else tensor for tensor in tensors]


def part(parameters: Parameters, prefix: str) -> Parameters:
    """Those under ``prefix``, by their names without it."""
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def tasks_by(how: str, images: Tensor) -> Callable[..., Any]:
    """What maps a function of one task over all: by a "loop", by "vmap", or "auto": by the device of ``images``."""
    return vmap_tasks if how == "vmap" or (how == "auto" and images.is_cuda) else loop_tasks


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
