"""Distances between queries and prototypes: [..., Q, D] and [..., W, D] give [..., Q, W]."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.functional.precision import in_float32


@in_float32
def squared_euclidean(x: Tensor, y: Tensor) -> Tensor:
    """||x - y||^2 by the expansion ||x||^2 - 2 x.y + ||y||^2: one matrix product, memory [..., Q, W].

    Both sides are first shifted by the mean of y. That changes no distance, but removes the large common part whose
    cancellation would cost digits in float32. Rounding can leave values slightly below 0.
    """
    if y.shape[-2] == 1:  # shifted by itself y is zero, and so is all that comes of it
        return (x - y).square().sum(-1, keepdim=True)
    centre = y.mean(-2, keepdim=True)
    x, y = x - centre, y - centre
    return x.square().sum(-1).unsqueeze(-1) - 2 * (x @ y.mT) + y.square().sum(-1).unsqueeze(-2)


@in_float32
def squared_euclidean_exact(x: Tensor, y: Tensor) -> Tensor:
    """||x - y||^2 by its definition: never negative and exact for equal points, memory [..., Q, W, D]."""
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)


def root(squares: Tensor) -> Tensor:
    """Square roots, with gradient 0 at 0 (for a distance the limit of the symmetric difference) instead of infinity."""
    positive = squares > 0
    return squares.where(positive, 1).sqrt().where(positive, 0)


@in_float32
def euclidean(x: Tensor, y: Tensor) -> Tensor:
    """||x - y||."""
    return root(squared_euclidean_exact(x, y))


@in_float32
def cosine(x: Tensor, y: Tensor, eps: float = 1e-8) -> Tensor:
    """1 - x.y / ((||x|| + eps) (||y|| + eps))."""
    return _cosine_of(_direction(x, eps), y, eps)


@in_float32
def dot(x: Tensor, y: Tensor) -> Tensor:
    """-x.y."""
    return -(x @ y.mT)


def by_class(distance: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """``distance`` to every prototype alone: bit for bit what it is when no other class is there.

    A matrix product over all prototypes rounds a class's entry differently with the number of classes.
    """
    if distance is cosine:  # the directions of the queries are the same for every class
        x, distance = _direction(x), _cosine_of
    return torch.cat([distance(x, one.clone()) for one in y.split(1, dim=-2)], dim=-1)


@in_float32
def _cosine_of(directions: Tensor, y: Tensor, eps: float = 1e-8) -> Tensor:
    return 1 - directions @ _direction(y, eps).mT


@in_float32
def _direction(x: Tensor, eps: float = 1e-8) -> Tensor:
    return x / (root(x.square().sum(-1, keepdim=True)) + eps)


DISTANCES = {"squared_euclidean": squared_euclidean, "euclidean": euclidean, "cosine": cosine, "dot": dot}


@in_float32
def unit(x: Tensor, eps: float = 1e-5) -> Tensor:
    """x / max(||x||, eps) over the last dimension: [..., D] to [..., D].

    Exact for vectors longer than ``eps``; a vector of zeros stays zero and has a finite gradient.
    """
    return x * x.square().sum(-1, keepdim=True).clamp(min=eps * eps).rsqrt()
