"""What Meta Networks (Munkhdalai & Yu 2017) do with gradients before a network reads them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.functional.distances import euclidean
from pipeline.functional.losses import PADDING
from pipeline.functional.precision import in_float32


@in_float32
def log_and_sign(x: Tensor, p: float) -> Tensor:
    """Numbers of any size as two of moderate size: (log|x| / p, sign x) if |x| >= e^-p, otherwise (-1, e^p x).

    Continuous, [...] to [..., 2] (Andrychowicz et al. 2016, appendix A).
    """
    large = x.abs() >= math.exp(-p)
    log = x.abs().where(large, 1).log() / p
    return torch.stack([log.where(large, -1), x.sign().where(large, math.exp(p) * x)], dim=-1)


@in_float32
def in_steps(gradients: Tensor, present: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The gradients of a task's images as a sequence of at most ``steps`` means over equally many images, but the last.

    Args:
        gradients: [T, S, P], those that are ``present`` [T, S] first.

    Returns:
        [T, min(S, steps), P], zeros after the last step of a task, and int64 [T], that last step.
    """
    count = present.sum(1, keepdim=True)
    size = (count + steps - 1) // steps
    place = torch.arange(present.shape[1], device=present.device).expand_as(present)
    step = torch.where(present, place // size.clamp(min=1), -1)
    members = (step.unsqueeze(1) == torch.arange(min(present.shape[1], steps), device=step.device).view(-1, 1)).to(
        gradients.dtype
    )
    return members @ gradients / members.sum(-1, keepdim=True).clamp(min=1), step.amax(1)


@in_float32
def contrastive_loss(embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Every image's mean, over the others of its task, of d^2 for its class and max(0, margin - d)^2 for other classes,
    halved and summed over images and tasks. [T, S, D] and labels [T, S] (-1 is padding)."""
    valid = labels != PADDING
    pair = valid.unsqueeze(1) & valid.unsqueeze(2) & ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    same = labels.unsqueeze(1) == labels.unsqueeze(2)
    distance = euclidean(embeddings, embeddings)
    losses = distance.square().where(same, (margin - distance).relu().square()).where(pair, 0)
    return 0.5 * (losses.sum((1, 2)) / (valid.sum(1) - 1).clamp(min=1)).sum()
