"""Triplets of an anchor, a positive of its class and a negative of another (Schroff, Kalenichenko & Philbin 2015).

The hinge of a triplet is max(0, d_ap - d_an + margin). Distances [T, N, N] are those of all images of a task with each
other, labels [T, N]; padding takes part in no triplet.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.functional.losses import PADDING
from pipeline.functional.precision import in_float32

MININGS = ("semi_hard", "facenet", "sandberg", "batch_all", "batch_hard")
REDUCTIONS = ("mean", "sum", "mean_nonzero")


class Mined(NamedTuple):
    """Hinges by ordered pair of anchor and positive [T, N, N], or by anchor [T, N]."""

    total: Tensor  # sum of the hinges
    triplets: Tensor  # number of triplets
    active: Tensor  # number of triplets with a hinge above 0


def positives(labels: Tensor) -> Tensor:
    """Ordered pairs of two images of one class: bool [T, N, N]."""
    itself = torch.eye(labels.shape[-1], dtype=torch.bool, device=labels.device)
    return (labels.unsqueeze(-1) == labels.unsqueeze(-2)) & (labels != PADDING).unsqueeze(-1) & ~itself


def negatives(labels: Tensor) -> Tensor:
    """Ordered pairs of images of two classes: bool [T, N, N]."""
    valid = labels != PADDING
    return (labels.unsqueeze(-1) != labels.unsqueeze(-2)) & valid.unsqueeze(-1) & valid.unsqueeze(-2)


def candidates(distances: Tensor, labels: Tensor, margin: float, beyond_positive: bool = True) -> Tensor:
    """Triplets (a, p, n) with d_an < d_ap + margin and, with ``beyond_positive``, d_an > d_ap: bool [T, N, N, N].

    With it they are FaceNet's semi-hard triplets, without all that violate the margin.
    """
    d_ap, d_an = distances.unsqueeze(-1), distances.unsqueeze(-2)
    triplets = positives(labels).unsqueeze(-1) & negatives(labels).unsqueeze(-2) & (d_an - d_ap < margin)
    return triplets & (d_an > d_ap) if beyond_positive else triplets


@in_float32
def mine(distances: Tensor, labels: Tensor, mining: str, margin: float) -> Mined:
    """The triplets of every task.

    ``batch_all``
        all of them.
    ``semi_hard``
        for every ordered pair of anchor and positive the negative with the smallest d_an > d_ap and, where there is
        none, with the largest d_an (the rule of tensorflow-addons).
    ``facenet``
        for every such pair a random semi-hard negative, d_ap < d_an < d_ap + margin; pairs that have none are left out
        (section 3.2).
    ``sandberg``
        for every unordered pair, whose anchor is the earlier image, a random negative with d_an < d_ap + margin; pairs
        that have none are left out (the code of the re-implementation).
    ``batch_hard``
        for every anchor that has a positive, its farthest positive and its nearest negative.
    """
    if mining in ("facenet", "sandberg"):
        return _random(distances, labels, margin, semi_hard=mining == "facenet")
    if mining == "batch_hard":
        return _batch_hard(distances, labels, margin)
    positive, negative = positives(labels), negatives(labels)
    ascending = distances.masked_fill(~negative, torch.inf).sort(-1).values  # of every anchor's negatives
    number = negative.sum(-1, keepdim=True)
    if mining == "semi_hard":
        after = torch.searchsorted(ascending.detach(), distances.detach(), right=True)
        chosen = ascending.gather(-1, after.minimum(number - 1).clamp(min=0))  # the largest, where none is farther
        hinge = F.relu(distances - chosen + margin)
        return _one_a_pair(hinge, positive & (number > 0))
    # All triplets: a pair's violating negatives are the first k of the ascending ones, so that sums are prefix sums.
    reach = distances + margin
    k = torch.searchsorted(ascending.detach(), reach.detach())
    prefix = F.pad(ascending.where(ascending.isfinite(), 0).cumsum(-1), (1, 0))
    total = (k * reach - prefix.gather(-1, k)).where(positive, 0)
    return Mined(total, number * positive, k * positive)


def reduce(mined: Mined, reduction: str) -> Tensor:
    """Hinges of every task [T]: their "mean", "sum", or the mean over those above 0."""
    total, count, active = (part.flatten(1).sum(1) for part in mined)
    if reduction == "sum":
        return total
    return total / (count if reduction == "mean" else active).clamp(min=1)


def _one_a_pair(hinge: Tensor, chosen: Tensor) -> Mined:
    """One triplet for every pair or anchor that is ``chosen``."""
    return Mined(hinge.where(chosen, 0), chosen, chosen & (hinge > 0))


def _random(distances: Tensor, labels: Tensor, margin: float, semi_hard: bool) -> Mined:
    allowed = candidates(distances, labels, margin, semi_hard)
    if not semi_hard:
        allowed = allowed & torch.ones_like(allowed[..., 0]).triu(1).unsqueeze(-1)
    drawn = torch.rand(allowed.shape, device=allowed.device).masked_fill(~allowed, -1).argmax(-1)
    return _one_a_pair(F.relu(distances - distances.gather(-1, drawn) + margin), allowed.any(-1))


def _batch_hard(distances: Tensor, labels: Tensor, margin: float) -> Mined:
    positive, negative = positives(labels), negatives(labels)
    farthest = distances.masked_fill(~positive, -torch.inf).amax(-1)
    nearest = distances.masked_fill(~negative, torch.inf).amin(-1)
    chosen = positive.any(-1) & negative.any(-1)
    return _one_a_pair(F.relu((farthest - nearest).where(chosen, 0) + margin), chosen)
