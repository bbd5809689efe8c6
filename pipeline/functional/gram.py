"""Products over the width of the features, exact enough for the solvers of the heads: all these accumulate in float64.

Where support images resemble each other, a head's coefficients are large and cancel each other. In float32 what is left
of their sum is rounding, and so is a ridge that is added to inner products of large features. Features, weights and the
gradients of both stay in the features' own precision; only a few thousand columns at a time are widened.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.functional.losses import PADDING
from pipeline.functional.precision import in_float32

CHUNK = 2048  # columns widened at once: they stay in the cache
ROWS = 25  # of a symmetric product computed at once


def inner(x: Tensor, y: Tensor) -> Tensor:
    """x y^T in float64: [T, n, d] and [T, m, d] give [T, n, m]."""
    product = x.new_zeros(len(x), x.shape[1], y.shape[1], dtype=torch.float64)
    for a, b in zip(x.split(CHUNK, dim=-1), y.split(CHUNK, dim=-1), strict=True):
        product.baddbmm_(a.double(), b.double().mT)
    return product


def own_inner(x: Tensor) -> Tensor:
    """x x^T in float64: [T, n, d] -> [T, n, n]; what is above the diagonal's blocks is copied from below."""
    product = x.new_zeros(len(x), x.shape[1], x.shape[1], dtype=torch.float64)
    for chunk in x.split(CHUNK, dim=-1):
        a = chunk.double()
        for first in range(0, x.shape[1], ROWS):
            last = first + ROWS
            product[:, first:last, :last].baddbmm_(a[:, first:last], a[:, :last].mT)
    return product.tril() + product.tril(-1).mT


def times(matrix: Tensor, features: Tensor) -> Tensor:
    """M X computed in float64, in the precision of X: float64 [T, m, n] and [T, n, d] give [T, m, d]."""
    if features.dtype == torch.float64:
        return matrix @ features
    product = features.new_empty(len(features), matrix.shape[1], features.shape[-1])
    for out, columns in zip(product.split(CHUNK, dim=-1), features.split(CHUNK, dim=-1), strict=True):
        out.copy_(matrix @ columns.double())
    return product


@in_float32
def gram(features: Tensor) -> Tensor:
    """X X^T in float64: [T, n, d] -> [T, n, n]; differentiable once."""
    return _Gram.apply(features)


def labelled_gram(features: Tensor, labels: Tensor) -> Tensor:
    """As :func:`gram`, with zeros in the rows and columns of padding: [T, n, d] and labels [T, n]."""
    real = labels != PADDING
    return gram(features) * (real.unsqueeze(-1) & real.unsqueeze(-2))


@in_float32
def combine(coefficients: Tensor, features: Tensor) -> Tensor:
    """A X: float64 [T, m, n] and [T, n, d] give [T, m, d] in the precision of the features; differentiable once."""
    return _Combine.apply(coefficients, features)


@in_float32
def linear_scores(features: Tensor, weights: Tensor) -> Tensor:
    """x.w: [..., q, d] and [..., way, d] give [..., q, way]."""
    return _Scores.apply(features, weights)


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return own_inner(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        return times(gradients[0] + gradients[0].mT, features)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, features: Tensor) -> Tensor:
        ctx.save_for_backward(coefficients, features)
        return times(coefficients, features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        coefficients, features = ctx.saved_tensors
        return inner(gradients[0], features), times(coefficients.mT, gradients[0])


class _Scores(torch.autograd.Function):
    """As the plain product, whose backward pass would write the weights' gradient transposed, several times as slow."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(features, weights)
        return features @ weights.mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        features, weights = ctx.saved_tensors
        return gradients[0] @ weights, gradients[0].mT @ features
