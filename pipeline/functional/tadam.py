"""TADAM (Oreshkin, Rodriguez & Lacoste 2018): scaled metrics, what their scale does to gradients, co-training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.functional.distances import euclidean, squared_euclidean_exact
from pipeline.functional.precision import in_float32
from pipeline.functional.prototypes import one_hot


@in_float32
def direction_distance(x: Tensor, y: Tensor, eps: float = 1e-6) -> Tensor:
    """||x / (||x|| + eps) - y / (||y|| + eps)||^2, twice one minus the cosine: x [..., Q, D], y [..., W, D]."""
    return squared_euclidean_exact(_direction(x, eps), _direction(y, eps))


METRICS = {"euclidean": euclidean, "squared_euclidean": squared_euclidean_exact, "cosine": direction_distance}


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


def l2_penalty(weights: Iterable[Tensor], scale: float) -> Tensor:
    """scale / 2 times the sum of squares, as TensorFlow: the gradient is that of an optimizer's weight_decay=scale."""
    return scale / 2 * torch.stack([w.square().sum() for w in weights]).sum()


def co_training_probability(step: int, steps: int, start: float = 0.9, decay: float = 0.9, times: int = 20) -> float:
    """Probability of the auxiliary task in step ``step`` of ``steps``: start * decay^floor(times * step / steps).

    The official code starts at .9, as the paper's text says; the paper's formula starts at 1.
    """
    return start * decay ** (times * step // steps)


def _direction(x: Tensor, eps: float) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) + eps)
