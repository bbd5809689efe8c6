"""What the scale of a metric does to gradients (Lemma 1 of TADAM), measured and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from torch import Tensor

from pipeline.charts.style import PALETTE, Kind, chart, render
from pipeline.functional.precision import in_float32
from pipeline.functional.prototypes import one_hot, prototypes
from pipeline.methods.tadam import METRICS

ALPHAS = np.logspace(-3, 3, 61)
FLOOR = 1e-8  # of what is drawn


@in_float32
def class_losses(distances: Tensor, labels: Tensor, alpha: Tensor | float) -> Tensor:
    """J_k(phi, alpha): the cross-entropy summed over the queries of class k. distances [Q, W], labels [Q] to [W]."""
    each = alpha * distances + (-alpha * distances).logsumexp(-1, keepdim=True)
    return (one_hot(labels, distances.shape[-1], distances.dtype) * each).sum(0)


def scaled_gradients(distances: Tensor, labels: Tensor, alpha: float, parameters: Tensor) -> Tensor:
    """(1 / alpha) dJ_k / dphi of every class k, and its limits at alpha = 0 and alpha = inf (Lemma 1).

    It is the sum over the queries x of k of d'_k - sum_j softmax_j(-alpha d) d'_j. The softmax is 1 / W for alpha = 0,
    where all prototypes but the right one are pushed away alike, and picks the nearest prototype for alpha = inf, where
    only mistakes count.

    Args:
        distances: [Q, W], of every query to every prototype, with the graph to ``parameters``.
        labels: int64 [Q]; -1 counts nowhere.
        alpha: from 0 to inf, both included.
        parameters: phi, of any shape.

    Returns:
        [W, *phi.shape].
    """
    way = distances.shape[-1]
    right = one_hot(labels, way, distances.dtype)
    if alpha == float("inf"):
        chosen = one_hot(distances.detach().argmin(-1), way, distances.dtype)
    else:
        chosen = (-alpha * distances.detach()).softmax(-1)
    weights = torch.einsum("qk,qj->kqj", right, right - chosen)  # of d'_j in class k's gradient
    (gradients,) = torch.autograd.grad(distances, parameters, weights, retain_graph=True, is_grads_batched=True)
    return gradients


@dataclass(frozen=True)
class Approach:
    """How far (1 / alpha) dJ_k / dphi is from its two limits, over alpha [A]; arrays [2, A], limit 0 and limit inf."""

    alphas: np.ndarray
    distance: np.ndarray  # norm of the difference, relative to the limit's
    angle: np.ndarray  # one minus the cosine


def approach(distances: Tensor, labels: Tensor, parameters: Tensor, alphas: Sequence[float] | np.ndarray) -> Approach:
    """Measured on the gradients of all classes together.

    Args:
        distances: [Q, W], of every query to every prototype, with the graph to ``parameters``.
        labels: int64 [Q].
    """
    limits = [scaled_gradients(distances, labels, alpha, parameters).flatten() for alpha in (0.0, inf)]
    found = [scaled_gradients(distances, labels, float(alpha), parameters).flatten() for alpha in alphas]
    distance = [[float((g - limit).norm() / limit.norm()) for g in found] for limit in limits]
    angle = [[1 - float(g @ limit / (g.norm() * limit.norm())) for g in found] for limit in limits]
    return Approach(np.asarray(alphas), np.asarray(distance), np.asarray(angle))


def example(metric: str = "euclidean", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A random 5-way 5-shot task under a random linear embedding: distances [Q, W], labels [Q] and phi, float64.

    Classes overlap, so that the nearest prototype of some queries is a wrong one.
    """
    generator = torch.Generator().manual_seed(seed)
    way, shot, asked, width = 5, 5, 10, 16
    centres = torch.randn(way, width, generator=generator, dtype=torch.float64)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(way).repeat_interleave(count)
        return centres[labels] + 2 * torch.randn(len(labels), width, generator=generator, dtype=torch.float64), labels

    phi = torch.randn(width, 8, generator=generator, dtype=torch.float64).div_(width**0.5).requires_grad_()
    (support, support_labels), (query, labels) = draw(shot), draw(asked)
    means, _ = prototypes((support @ phi)[None], support_labels[None], way)
    return METRICS[metric](query @ phi, means[0]), labels, phi


def lemma_plot(measured: Approach, title: str = "", kind: Kind = "png") -> bytes:
    """Distance and angle to both limits over the scale."""
    with chart(7, 5.4) as drawn, rc_context({"text.parse_math": True}):
        above, below = drawn.subplots(2, 1, sharex=True)
        _panel(above, measured.alphas, measured.distance, "relative distance")
        _panel(below, measured.alphas, measured.angle, "1 - cosine")
        above.text(
            0.03,
            0.3,
            "to the limit α → 0:\nall other prototypes push alike",
            color=PALETTE[0],
            transform=above.transAxes,
        )
        above.text(
            0.72,
            0.1,
            "to the limit α → ∞:\nonly the nearest, of mistakes",
            color=PALETTE[1],
            transform=above.transAxes,
            ha="right",
        )
        above.set_title(title or "A metric's scale decides what a gradient sees")
        below.set_xlabel("metric scale α")
        return render(drawn, kind)


def _panel(axes: Axes, alphas: np.ndarray, values: np.ndarray, label: str) -> None:
    for line, colour in zip(values, PALETTE, strict=False):
        axes.plot(alphas, np.maximum(line, FLOOR), color=colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(alphas[0], alphas[-1])
    axes.set_ylim(FLOOR, 3)
    axes.tick_params(which="minor", size=0)
    axes.set_ylabel(label)
