"""Regularisation of a classifier by its targets: label smoothing and mixed pairs of images."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.functional.precision import in_float32


@in_float32
def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy of logits [N, C] with targets 1 - smoothing at the label and smoothing / (C - 1) elsewhere."""
    log_p = logits.log_softmax(-1)
    true = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    others = (log_p.sum(-1) - true) / max(logits.shape[-1] - 1, 1)
    return -((1 - smoothing) * true + smoothing * others).mean()


def mix_pairs(images: Tensor, concentration: float) -> tuple[Tensor, Tensor, float]:
    """Every image [N, ...] mixed with another of the batch (mixup, Zhang et al. 2018).

    Returns:
        share x_i + (1 - share) x_j, the indices j [N], and the share, drawn once from Beta(concentration,
        concentration) by PyTorch's global generator.
    """
    share = float(torch.distributions.Beta(concentration, concentration).sample())
    other = torch.randperm(len(images)).to(images.device)
    return share * images + (1 - share) * images[other], other, share
