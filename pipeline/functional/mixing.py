"""Pairs of training images mixed (mixup, Zhang et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor


def mix_pairs(images: Tensor, concentration: float) -> tuple[Tensor, Tensor, float]:
    """Every image [N, ...] mixed with another of the batch.

    Returns:
        share x_i + (1 - share) x_j, the indices j [N], and the share, drawn once from Beta(concentration,
        concentration) by PyTorch's global generator.
    """
    share = float(torch.distributions.Beta(concentration, concentration).sample())
    other = torch.randperm(len(images)).to(images.device)
    return share * images + (1 - share) * images[other], other, share
