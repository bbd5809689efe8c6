"""Class means."""

import torch
from torch import Tensor

from pipeline.functional.precision import in_float32


def one_hot(labels: Tensor, way: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Indicator [..., S, way] of labels [..., S]; a label outside 0..way-1 (padding) gives a row of zeros."""
    return (labels.unsqueeze(-1) == torch.arange(way, device=labels.device)).to(dtype)


@in_float32
def refined(means: Tensor, counts: Tensor, embeddings: Tensor, shares: Tensor) -> Tensor:
    """Prototypes [T, way, D] of ``counts`` [T, way] images each, meaned with others that belong to them in part.

    Args:
        embeddings: of the others, [T, Q, D], with their shares [T, Q, way].
    """
    total = counts + shares.sum(-2)
    return (counts.unsqueeze(-1) * means + shares.mT @ embeddings) / total.unsqueeze(-1)


@in_float32
def prototypes(embeddings: Tensor, labels: Tensor, way: int) -> tuple[Tensor, Tensor]:
    """Mean embedding of every class over the class's own number of images.

    Args:
        embeddings: [T, S, D].
        labels: int64 [T, S] in 0..way-1 in any order; -1 marks padding that belongs to no class.

    Returns:
        prototypes [T, way, D] (zero for a class without images) and counts [T, way].
    """
    members = one_hot(labels, way, embeddings.dtype)
    counts = members.sum(-2)
    return members.mT @ embeddings / counts.clamp(min=1).unsqueeze(-1), counts
