"""Which images a batch holds."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def class_balanced(labels: Tensor, batch_size: int, batches: int, seed: int) -> Iterator[Tensor]:
    """Indices [batch_size] into ``labels`` [N]: a class uniformly at random, then one of its images, with replacement.

    So a new class with one image is seen as often as one with hundreds. Equal arguments give equal batches.
    """
    generator = torch.Generator().manual_seed(seed)
    order = labels.cpu().argsort(stable=True)
    counts = labels.cpu().bincount()
    starts = counts.cumsum(0) - counts
    present = counts.nonzero().squeeze(1)
    for _ in range(batches):
        classes = present[torch.randint(len(present), (batch_size,), generator=generator)]
        position = (torch.rand(batch_size, generator=generator, dtype=torch.float64) * counts[classes]).long()
        yield order[starts[classes] + position]
