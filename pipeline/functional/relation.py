"""Relation networks (Sung et al. 2018): class maps, and the loss of relation scores."""

from __future__ import annotations

from torch import Tensor

from pipeline.functional.losses import labelled
from pipeline.functional.precision import in_float32
from pipeline.functional.prototypes import one_hot


@in_float32
def class_maps(maps: Tensor, labels: Tensor, way: int, mean: bool = False) -> Tensor:
    """Element-wise sum (section 3.2) of the feature maps of every class, or their ``mean``.

    [T, S, C, H, W] and labels [T, S] give [T, way, C, H, W]; the label -1 belongs to no class.
    """
    members = one_hot(labels, way, maps.dtype)
    summed = members.mT @ maps.flatten(2)
    if mean:
        summed = summed / members.sum(-2).clamp(min=1).unsqueeze(-1)
    return summed.unflatten(-1, maps.shape[2:])


@in_float32
def relation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared error of the relation scores sigmoid(``logits``) [T, Q, way] against 1 for the class of the query and 0
    for the others (equation 2), mean over the entries of all queries that have a label [T, Q]."""
    squared = (logits.sigmoid() - one_hot(labels, logits.shape[-1], logits.dtype)).square().sum(-1)
    return squared.where(labels >= 0, 0).sum() / (labelled(labels).sum() * logits.shape[-1])
