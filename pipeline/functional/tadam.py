"""TADAM (Oreshkin, Rodriguez & Lacoste 2018): scaled metrics and co-training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.functional.distances import euclidean, squared_euclidean_exact
from pipeline.functional.precision import in_float32


@in_float32
def direction_distance(x: Tensor, y: Tensor, eps: float = 1e-6) -> Tensor:
    """||x / (||x|| + eps) - y / (||y|| + eps)||^2, twice one minus the cosine: x [..., Q, D], y [..., W, D]."""
    return squared_euclidean_exact(_direction(x, eps), _direction(y, eps))


METRICS = {"euclidean": euclidean, "squared_euclidean": squared_euclidean_exact, "cosine": direction_distance}


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
