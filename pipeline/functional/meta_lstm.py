"""The LSTM that updates every coordinate of a learner's weights (Ravi & Larochelle 2017).

Coordinates come last, so that the gates of all of them are one matrix product and each gate lies in one piece.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.functional.precision import in_float32

CHUNK = 8192  # coordinates that are replayed at once


class CellWeights(NamedTuple):
    """H hidden units; gates in PyTorch's order: input, forget, cell, output."""

    inputs: Tensor  # [4H, 4], of the preprocessed loss and gradient
    hidden: Tensor  # [4H, H]
    bias: Tensor  # [4H]
    gates: Tensor  # [2, H + 2], rows: forget and input gate of the update; columns: h, theta, the gate before
    gate_bias: Tensor  # [2]


class CellState(NamedTuple):
    theta: Tensor  # [T, P] weights of T learners
    hidden: Tensor  # [H, T, P]
    cell: Tensor  # [H, T, P]
    gates: Tensor  # [2, T, P] before the sigmoid
    fed_back: Tensor  # [2, T, P] what the next gates see of these


@in_float32
def preprocess(x: Tensor, p: float = 10.0, dim: int = -1) -> Tensor:
    """Numbers of any size as two of moderate size: (log|x| / p, sign x) if |x| >= e^-p, otherwise (-1, e^p x).

    Continuous; the two are stacked at ``dim`` (section 3.2 of the paper; Andrychowicz et al. 2016, appendix A).
    """
    large = x.abs() >= math.exp(-p)
    log = x.abs().where(large, 1).log() / p  # of 1 where it is not taken, which has a gradient
    return torch.stack([log.where(large, -1), x.sign().where(large, math.exp(p) * x)], dim)


def first_state(theta: Tensor, hidden: int) -> CellState:
    """Before the first update of theta [T, P]: everything else is 0."""
    zeros = theta.new_zeros(hidden, *theta.shape)
    gates = theta.new_zeros(2, *theta.shape)
    return CellState(theta, zeros, zeros, gates, gates)


@in_float32
def cell_step(
    weights: CellWeights, state: CellState, gradient: Tensor, loss: Tensor, p: float = 10.0, pre_sigmoid: bool = True
) -> CellState:
    """theta' = sigmoid(f) theta - sigmoid(i) gradient, with gates f and i of an LSTM (equations 2 to 4)::

        h, c = LSTM([preprocess(loss), preprocess(gradient)], h, c)
        f = W_F [h, theta, f before] + b_F        i = W_I [h, theta, i before] + b_I

    Args:
        gradient: [T, P] of the learners' losses [T], both constants: what is differentiated is the chain of thetas.
        pre_sigmoid: the gates see themselves before the sigmoid, as the official code; otherwise after it, as the
            paper's notation says.
    """
    seen = preprocess(loss, p, dim=0).unsqueeze(-1).expand(-1, *gradient.shape)
    x = torch.cat([state.hidden, seen, preprocess(gradient, p, dim=0)]).flatten(1)
    mixed = torch.addmm(weights.bias.unsqueeze(1), torch.cat([weights.hidden, weights.inputs], dim=1), x)
    entry, forget, new, out = mixed.view(4, *state.cell.shape)
    cell = forget.sigmoid() * state.cell + entry.sigmoid() * new.tanh()
    hidden = out.sigmoid() * cell.tanh()
    size = len(hidden)
    own = (weights.gates[:, :size] @ hidden.flatten(1)).view_as(state.gates)
    gates = (
        own
        + weights.gates[:, size, None, None] * state.theta
        + weights.gates[:, size + 1, None, None] * state.fed_back
        + weights.gate_bias[:, None, None]
    )
    opened = gates.sigmoid()
    theta = opened[0] * state.theta - opened[1] * gradient
    return CellState(theta, hidden, cell, gates, gates if pre_sigmoid else opened)


def unroll(
    weights: CellWeights, theta: Tensor, gradients: Tensor, losses: Tensor, p: float = 10.0, pre_sigmoid: bool = True
) -> Tensor:
    """theta [T, P] after K updates with gradients [K, T, P] and losses [K, T] that are known beforehand."""
    state = first_state(theta, weights.hidden.shape[1])
    for gradient, loss in zip(gradients, losses, strict=True):
        state = cell_step(weights, state, gradient, loss, p, pre_sigmoid)
    return state.theta


def replayed(
    end: Tensor,
    weights: CellWeights,
    theta: Tensor,
    gradients: Tensor,
    losses: Tensor,
    p: float = 10.0,
    pre_sigmoid: bool = True,
) -> Tensor:
    """``end``, which :func:`unroll` led to without a graph, with the derivative of ``unroll``.

    As gradients and losses are constants, coordinates do not depend on each other: the derivative is taken of
    ``CHUNK`` of them at a time, in memory that does not grow with their number.
    """
    return _Replay.apply(end, gradients, losses, (p, pre_sigmoid), theta, *weights)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, end: Tensor, gradients: Tensor, losses: Tensor, options: tuple[float, bool], *start: Tensor
    ) -> Tensor:
        ctx.save_for_backward(gradients, losses, *start)
        ctx.options = options
        return end.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients, losses, theta, *weights = ctx.saved_tensors
        found_theta, found = torch.empty_like(theta), [torch.zeros_like(w) for w in weights]
        leaves = [w.detach().requires_grad_() for w in weights]
        for first in range(0, theta.shape[1], CHUNK):
            part = slice(first, first + CHUNK)
            with torch.enable_grad():
                leaf = theta[:, part].detach().requires_grad_()
                end = unroll(CellWeights(*leaves), leaf, gradients[:, :, part], losses, *ctx.options)
                of_theta, *of_weights = torch.autograd.grad(end, [leaf, *leaves], outer[:, part])
            found_theta[:, part] = of_theta
            for total, one in zip(found, of_weights, strict=True):
                total += one
        return None, None, None, None, found_theta, *found
