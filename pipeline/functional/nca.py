"""Neighbourhood components (Goldberger et al. 2004) and their form with proxies (Movshovitz-Attias et al. 2017).

Distances [T, N, N] are those of all images of a task with each other, labels [T, N]; padding is no one's neighbour.
"""

import torch
from torch import Tensor

from pipeline.functional.distances import squared_euclidean, unit
from pipeline.functional.losses import PADDING
from pipeline.functional.precision import in_float32
from pipeline.functional.prototypes import one_hot
from pipeline.functional.triplets import negatives, positives


@in_float32
def neighbour_probabilities(distances: Tensor, labels: Tensor) -> Tensor:
    """p_ij = exp(-d_ij) / sum_{k != i} exp(-d_ik), and 0 for j = i: [T, N, N] (equation 1)."""
    return (-distances).masked_fill(~_others(labels), -torch.inf).softmax(-1)


@in_float32
def log_right_neighbour(distances: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """log p_i, p_i = sum of p_ij over the other images j of i's class (equation 2), and which images have any.

    Both [T, N]; log p_i is 0 for an image that has none.
    """
    positive = positives(labels)
    right, has_positive = _logsumexp(-distances, positive), positive.any(-1)
    return (right - _logsumexp(-distances, _others(labels))).where(has_positive, 0), has_positive


@in_float32
def pair_losses(distances: Tensor, labels: Tensor, with_positive: bool) -> Tensor:
    """Mean over all ordered pairs (x, y) of one class of :func:`nca_loss`, Z the images of other classes: [T]."""
    pair = positives(labels) & negatives(labels).any(-1, keepdim=True)
    log_others = _logsumexp(-distances, negatives(labels)).unsqueeze(-1)
    losses = nca_loss(distances, log_others, with_positive).where(pair, 0)
    return losses.sum((-2, -1)) / pair.sum((-2, -1)).clamp(min=1)


def nca_loss(distance: Tensor, log_others: Tensor, with_positive: bool) -> Tensor:
    """L(x, y, Z) = d(x, y) + log sum_{z in Z} exp(-d(x, z)), from d(x, y) and that logarithm.

    Z does not hold y, so that the loss can fall below 0 (Proxy-NCA, equation 3); ``with_positive`` it does.
    """
    return distance + (torch.logaddexp(log_others, -distance) if with_positive else log_others)


@in_float32
def proxy_distances(x: Tensor, proxies: Tensor, scale_x: float, scale_p: float) -> Tensor:
    """||s_x x/|x| - s_p p/|p| ||^2 = s_x^2 + s_p^2 - 2 s_x s_p cos(x, p): [..., N, D] and [..., C, D] to [..., N, C].

    A softmax of minus these is a cosine softmax of scale 2 s_x s_p.
    """
    return squared_euclidean(scale_x * unit(x), scale_p * unit(proxies))


@in_float32
def proxy_nca(distances: Tensor, labels: Tensor, with_positive: bool, smoothing: float = 0.0) -> Tensor:
    """Loss of every image [N], from distances [N, C] to the proxies of all classes and labels [N].

    Args:
        with_positive: the image's own proxy is in the denominator, which makes the loss a cross-entropy.
        smoothing: with it, the share of the target that is spread over the other classes, epsilon / (C - 1) each.
    """
    own = one_hot(labels, distances.shape[-1]).bool()
    if with_positive:
        spread = smoothing / max(distances.shape[-1] - 1, 1)
        target = torch.full_like(distances, spread).masked_fill(own, 1 - smoothing)
        return -(target * (-distances).log_softmax(-1)).sum(-1)
    log_others = (-distances).masked_fill(own, -torch.inf).logsumexp(-1)
    return nca_loss(distances.gather(-1, labels.unsqueeze(-1)).squeeze(-1), log_others, with_positive=False)


def _others(labels: Tensor) -> Tensor:
    """Ordered pairs of two images that are there: bool [T, N, N]."""
    valid = labels != PADDING
    itself = torch.eye(labels.shape[-1], dtype=torch.bool, device=labels.device)
    return valid.unsqueeze(-2) & ~itself


def _logsumexp(x: Tensor, mask: Tensor) -> Tensor:
    """Over the masked entries of the last dimension; 0, and no gradient, where there are none."""
    some = mask.any(-1)
    return x.masked_fill(~mask & some.unsqueeze(-1), -torch.inf).logsumexp(-1).where(some, 0)
