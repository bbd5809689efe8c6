"""A classifier that starts from its support set, and what is minimised from there (Dhillon et al. 2020)."""

import torch
from torch import Tensor

from pipeline.functional.distances import unit
from pipeline.functional.losses import PADDING
from pipeline.functional.precision import in_float32
from pipeline.functional.prototypes import one_hot


@in_float32
def direction_scores(embeddings: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """w.z / ||z|| + b: [..., N, D], [..., W, D] and [..., W] give [..., N, W]. There is no scale."""
    return unit(embeddings) @ weight.mT + bias.unsqueeze(-2)


@in_float32
def mean_entropy(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean Shannon entropy in nats of the answers [..., N, way] that are ``counted`` [..., N] (None: all): [...]."""
    entropies = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    if counted is None:
        return entropies.mean(-1)
    return entropies.where(counted, 0).sum(-1) / counted.sum(-1)


@in_float32
def hardness(logits: Tensor, labels: Tensor) -> Tensor:
    """How hard tasks are: mean over labelled queries of log((1 - p) / p), p the probability of the true class.

    Args:
        logits: [..., Q, way], of a classifier that starts from the support set, before any fine-tuning (section 4.4).
        labels: int64 [..., Q].

    Returns:
        [...], exact for answers near certainty too.
    """
    true = one_hot(labels, logits.shape[-1], torch.bool)
    log_odds = logits.masked_fill(true, -torch.inf).logsumexp(-1) - logits.where(true, 0).sum(-1)
    counted = labels != PADDING
    return log_odds.where(counted, 0).sum(-1) / counted.sum(-1)
