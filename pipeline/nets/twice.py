"""Batch normalisation whose gradient is differentiated in few operations, for methods that differentiate twice.

PyTorch writes the derivative of its batch-norm's gradient in about a hundred elementary operations, which is a large
part of a second-order inner loop on small images. Here it is the fused gradient kernel once more and a few sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_gradient = torch.ops.aten.native_batch_norm_backward
_ALL = [True, True, True]


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [N, C, ...] normalised by its own statistics, times weight [C] plus bias [C].

    Bit for bit PyTorch's on CPU, and so is its gradient; what can be differentiated twice, and no more often.
    """
    out: Tensor = _Normalised.apply(x, weight, bias, eps)
    return out


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, mean, scale = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        found: tuple[Tensor, Tensor, Tensor] = _Gradient.apply(outer, *ctx.saved_tensors, ctx.eps)
        return *found, None


class _Gradient(torch.autograd.Function):
    """Of x^ w + b, with x^ = (x - mean) s and s = 1 / sqrt(var + eps), for the outer gradient g:

    of x: w s P(g), with P(g) = g - mean(g) - x^ mean(g x^);  of w: sum(g x^);  of b: sum(g).
    """

    @staticmethod
    def forward(ctx: Any, outer: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float) -> Any:
        of_x, of_weight, of_bias = _gradient(outer, x, weight, None, None, mean, scale, True, eps, _ALL)
        ctx.save_for_backward(outer, x, weight, mean, scale, of_weight, of_bias)
        ctx.eps = eps
        return of_x, of_weight, of_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor, v_weight: Tensor, v_bias: Tensor) -> tuple[Tensor | None, ...]:
        """Of <v, w s P(g)> + <v_weight, sum(g x^)> + <v_bias, sum(g)>, for g, x and w.

        P is symmetric, s falls by s^2 x^ / M and the means of g x^ and v x^ rise by s P(g) / M and s P(v) / M as x
        rises (M values a channel), so that with K = sum(g s P(v)):

        of g: w s P(v) + v_weight x^ + v_bias;  of w: K;
        of x: (v_weight - w s mean(v x^)) s P(g) - w s mean(g x^) s P(v) - w s K / M x^.
        """
        g, x, weight, mean, s, sum_gx, sum_g = ctx.saved_tensors
        m, over = x.numel() // x.shape[1], [0, *range(2, x.ndim)]
        projected, sum_vx, _ = _gradient(v, x, None, None, None, mean, s, True, ctx.eps, _ALL)  # s P(v), ...
        k = (g * projected).sum(over)
        ws = weight * s
        of_pg = (v_weight - ws * sum_vx / m) * s  # times P(g) = g - sum_g / m - x^ sum_gx / m
        of_normal = -(ws * k + of_pg * sum_gx) / m  # times x^
        slope, other = of_normal * s, v_weight * s  # times x, as x^ = s x - s mean
        of_g = torch.addcmul(_wide(v_bias - other * mean, x), _wide(weight, x), projected).addcmul_(_wide(other, x), x)
        of_x = torch.addcmul(_wide(-of_pg * sum_g / m - slope * mean, x), _wide(of_pg, x), g)
        of_x.addcmul_(_wide(slope, x), x).addcmul_(_wide(-ws * sum_gx / m, x), projected)
        return of_g, of_x, k, None, None, None


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """[C] to [C, 1, ...], which broadcasts over ``like`` [N, C, ...]."""
    return values.view(-1, *[1] * (like.ndim - 2))
