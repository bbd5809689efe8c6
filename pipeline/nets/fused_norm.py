"""Batch normalisation by PyTorch's fused kernels, where PyTorch's own on CPU is inexact or slow.

On channels-last maps its kernel sums all values of a channel into one float32: where most of an image is background,
so that a channel's mean is large beside its deviation, the mean was wrong by a third of the deviation (400 images of
28x28). Here the kernel sums a piece at a time, as fast.

And it writes the derivative of its batch-norm's gradient in about a hundred elementary operations, which is a large
part of a second-order inner loop on small images. Here it is the fused gradient kernel once more and a few sums.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 2048  # values of a channel that are summed at once

_gradient = torch.ops.aten.native_batch_norm_backward
_ALL = [True, True, True]


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C, ...] normalised by its own statistics, times weight [C] plus bias [C]; its mean and biased variance [C].

    Bit for bit PyTorch's on CPU, and so is its gradient, but where PyTorch's is inexact. It can be differentiated
    twice, and no more often; the statistics cannot.
    """
    out, mean, var = _Normalised.apply(x, weight, bias, eps)
    return out, mean, var


def inexact(x: Tensor) -> bool:
    """Whether PyTorch's kernel for CPU loses digits of the statistics of x [N, C, ...]."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return last and x.numel() > PIECE * x.shape[1]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of channels-last x [N, C, H, W], from those of pieces (Chan et al. 1983)."""
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # a view
    pieces = rows.split(PIECE)
    found = [torch.batch_norm_update_stats(piece.t()[None, :, None], None, None, 0.0) for piece in pieces]
    means, variances = (torch.stack(values) for values in zip(*found, strict=True))
    share = torch.tensor([len(piece) / len(rows) for piece in pieces], dtype=means.dtype).unsqueeze(1)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        if inexact(x):
            mean, var = _moments(x)
            out, _, _ = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)
            scale = (var + eps).rsqrt()
        else:
            out, mean, scale = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
            var = scale**-2 - eps
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    def backward(ctx: Any, outer: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
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
        of_g = torch.addcmul(wide(v_bias - other * mean, x), wide(weight, x), projected).addcmul_(wide(other, x), x)
        of_x = torch.addcmul(wide(-of_pg * sum_g / m - slope * mean, x), wide(of_pg, x), g)
        of_x.addcmul_(wide(slope, x), x).addcmul_(wide(-ws * sum_gx / m, x), projected)
        return of_g, of_x, k, None, None, None


def wide(values: Tensor, like: Tensor) -> Tensor:
    """[C] to [C, 1, ...], which broadcasts over ``like`` [N, C, ...]."""
    return values.view(-1, *[1] * (like.ndim - 2))
