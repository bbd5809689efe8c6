"""Pairs of images, same class or not: Siamese networks (Koch, Zemel & Salakhutdinov 2015)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.functional.losses import PADDING
from pipeline.functional.neighbours import class_logsumexp, class_max
from pipeline.functional.precision import in_float32


@in_float32
def weighted_l1(x: Tensor, y: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    """The logit of p(same) = sigmoid(sum_j alpha_j |x_j - y_j| + b): [..., D] and [..., D] give [...]."""
    return (x - y).abs() @ alpha + bias


@in_float32
def every_weighted_l1(x: Tensor, y: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    """:func:`weighted_l1` of every query with every image: [T, Q, D] and [T, S, D] give [T, Q, S] in that memory.

    alpha_j |x_j - y_j| is a distance of scaled coordinates, added where alpha is positive and taken off where not.
    """
    towards, away = alpha.relu(), (-alpha).relu()
    return torch.cdist(x * towards, y * towards, p=1.0) - torch.cdist(x * away, y * away, p=1.0) + bias


@in_float32
def contrastive(distance: Tensor, same: Tensor, margin: float) -> Tensor:
    """Mean of d^2 / 2 over same pairs and max(0, margin - d)^2 / 2 over the others (Hadsell, Chopra & LeCun 2006).

    Args:
        distance: [...], Euclidean.
        same: bool [...], whether the two images are of one class.
    """
    return 0.5 * distance.square().where(same, F.relu(margin - distance).square()).mean()


@in_float32
def class_evidence(logits: Tensor, members: Tensor, shots: str) -> Tensor:
    """From p(same as image) to p(same as class), as logits: [T, Q, S] and members [T, S, way] give [T, Q, way].

    ``shots``: "mean" or "max" of the probabilities of the class's images. The logit of a mean is taken from the
    logarithms of p and 1 - p, so that classes keep their order where p rounds to 1.
    """
    if shots == "max":
        return class_max(logits, members)
    same = class_logsumexp(F.logsigmoid(logits), members)
    return same - class_logsumexp(F.logsigmoid(-logits), members)


def draw_pairs(labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of images of every task, half of them of one class, uniformly among all such pairs, with replacement.

    Args:
        labels: int64 [T, N] with at least two images of a class and at least two classes; padding is never drawn.
        count: P, even.

    Returns:
        positions in N of the first and of the second images, int64 [T, P], and whether they are of one class, bool
        [T, P].
    """
    n = labels.shape[-1]
    valid = labels != PADDING
    pair = (valid.unsqueeze(-1) & valid.unsqueeze(-2)).tril(-1)
    alike = labels.unsqueeze(-1) == labels.unsqueeze(-2)
    drawn = [(pair & kind).flatten(1).float().multinomial(count // 2, True) for kind in (alike, ~alike)]
    chosen = torch.cat(drawn, dim=1)
    return chosen // n, chosen % n, alike.flatten(1).gather(1, chosen)
