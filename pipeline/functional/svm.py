"""The multi-class SVM of Crammer & Singer (2001), differentiable at its optimum (MetaOptNet, Lee et al. 2019)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.functional.capped_qp import Face, Program, Solution, derivative, interior_point, minimise
from pipeline.functional.gram import CHUNK, inner, own_inner, times
from pipeline.functional.losses import PADDING
from pipeline.functional.precision import in_float32
from pipeline.functional.prototypes import one_hot

FLOOR = 1e-10  # least ridge, in units of the mean squared norm: without any, equal images have no unique answer


@in_float32
def svm_weights(
    features: Tensor, labels: Tensor, way: int, cost: float = 0.1, ridge: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Weights of every task's SVM (MetaOptNet, equations 4 to 7): w_k = sum_i A_ki x_i for the A that::

        minimises   1/2 <A, A (X X^T + ridge I)> - sum_i A_{y_i, i}
        subject to  A_ki <= cost [k = y_i],   sum_k A_ki = 0.

    The authors' code, which the published figures were made with, has a ridge of 1 "to avoid PSD errors"; the paper has
    none. A ridge of less than 1e-10 of the mean squared norm is raised to that.

    The gradient is that of the exact optimum, by implicit differentiation on the face of active constraints. Features
    enter through X X^T and products with ``way`` columns, in float64 (see :mod:`pipeline.functional.gram`).

    Args:
        features: X, [T, n, d].
        labels: int64 [T, n], in any order and number a class; -1 marks padding.

    Returns:
        [T, way, d], and by how much each task violates the conditions of the optimum, [T]: where that is more than
        1e-10 the solver gave up, and weights are the best it found.
    """
    return _Svm.apply(features, labels, way, cost, ridge)


@in_float32
def svm_weights_inexact(
    features: Tensor, labels: Tensor, way: int, cost: float = 0.1, ridge: float = 1.0, iterations: int = 3
) -> Tensor:
    """Weights [T, way, d] from so many iterations of the interior-point method, without a gradient.

    The authors' code does 3 at test, which is far from the optimum: not even the caps hold. Without padding.
    """
    with torch.no_grad():
        hessian = own_inner(features)
        hessian.diagonal(dim1=-2, dim2=-1).add_(ridge)
        y = one_hot(labels, way, torch.float64).mT
        return times(interior_point(Program(hessian, y, cost * y), iterations)[0], features)


def crammer_singer(
    gram: Tensor, labels: Tensor, way: int, cost: float = 0.1, ridge: float = 1.0
) -> tuple[Solution, Program, Tensor]:
    """The dual problem of :func:`svm_weights` for X X^T [T, n, n] in float64, and its solution, without a gradient.

    Returns:
        The solution, whose ``alpha`` [T, way, n] is A; the program it solves, which is for size * A; and that size
        [T, 1, 1], with which the Hessian's mean diagonal is at most 1 and the caps at least 1.
    """
    real = labels != PADDING
    y = one_hot(labels, way, torch.float64).mT
    gram = gram * (real.unsqueeze(-1) & real.unsqueeze(-2))
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1) / real.sum(-1)
    added = torch.maximum(torch.full_like(norm, ridge), FLOOR * norm).clamp(min=1e-100)
    size = (norm + added).clamp(min=1 / cost)[:, None, None]
    # Padding is an image with nothing in common with any and no part in the objective: its optimum is zero.
    diagonal = torch.where(real, added.unsqueeze(-1), size.squeeze(-1))
    caps = y.clone()
    caps[:, 0] += ~real
    program = Program((gram + torch.diag_embed(diagonal)) / size, y, cost * size * caps)
    found = minimise(program)
    found.alpha.div_(size).masked_fill_(~real.unsqueeze(1), 0)
    return found, program, size


class _Svm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, labels: Tensor, way: int, cost: float, ridge: float
    ) -> tuple[Tensor, Tensor]:
        found, program, size = crammer_singer(own_inner(features), labels, way, cost, ridge)
        padding = (labels == PADDING).unsqueeze(1)
        saved = (program.hessian, size, padding, found.alpha, found.free, found.inverses, found.sums)
        ctx.save_for_backward(features, *saved)
        ctx.mark_non_differentiable(found.violation)
        return times(found.alpha, features), found.violation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """dX = A^T g - (A^T P + P^T A) X, where P is the optimum's derivative in the direction g X^T.

        (A^T P + P^T A) is the gradient of X X^T, of rank 2 way: it is never multiplied out.
        """
        features, hessian, size, padding, alpha, *face = ctx.saved_tensors
        gradient = gradients[0]
        adjoint = derivative(hessian, Face(*face), inner(gradient, features)) / size
        adjoint = adjoint.masked_fill(padding, 0)
        both = torch.cat([alpha, adjoint], dim=1)
        found = torch.empty_like(features)
        for out, g, x in zip(*(t.split(CHUNK, dim=-1) for t in (found, gradient, features)), strict=True):
            weights, moved = (both @ x.double()).chunk(2, dim=1)
            out.copy_(both.mT @ torch.cat([g - moved, -weights], dim=1))
        return found, None, None, None, None
