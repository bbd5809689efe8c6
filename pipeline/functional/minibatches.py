"""Minibatches of a small set, as Reptile's inner loops draw them."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.functional.losses import PADDING, labelled


def consecutive(size: int, batch: int, batches: int, generator: torch.Generator | None = None) -> Tensor:
    """Indices [batches, batch] into ``size`` items: the set is shuffled again and again into one endless row, which is
    cut into batches, so that what remains of one shuffle goes into a batch with the beginning of the next."""
    rounds = -(-batch * batches // size)
    row = torch.cat([torch.randperm(size, generator=generator) for _ in range(max(1, rounds))])
    return row[: batch * batches].view(batches, batch)


def task_minibatches(labels: Tensor, batch: int, batches: int, seed: int | None = None) -> Tensor:
    """Minibatches of every task: indices [batches, T, batch] into items with labels [T, N], padding left out.

    Args:
        seed: every task's shuffles begin from it, so that they do not depend on the other tasks; None: they come from
            PyTorch's global generator.
    """
    first = (labels == PADDING).byte().argsort(dim=1, stable=True)  # of every task: what is labelled, then the padding
    drawn = []
    for size in labelled(labels).tolist():
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        drawn.append(consecutive(size, batch, batches, generator))
    index = torch.stack(drawn, dim=1).to(labels.device)
    return first.expand(batches, *first.shape).gather(2, index)
