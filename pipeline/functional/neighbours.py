"""Answers of remembered support images: class means, the nearest image, or all images by their distance.

A support set of labels [T, S] is kept as ``members`` [T, S, way], the indicator of every image's class; padding has a
row of zeros and belongs to none.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.functional.distances import by_class
from pipeline.functional.precision import in_float32
from pipeline.functional.prototypes import one_hot, prototypes

Distance = Callable[[Tensor, Tensor], Tensor]
ANSWERS = ("class_mean", "nearest", "soft")


@in_float32
def remember(embeddings: Tensor, labels: Tensor, way: int, answer: str) -> dict[str, Tensor]:
    """What an answer needs of the support: embeddings [T, S, D] with labels [T, S].

    "class_mean": the means "prototypes" [T, way, D] and "counts" [T, way] of images behind them; otherwise the
    embeddings "support" [T, S, D] and their classes "members" [T, S, way].
    """
    if answer == "class_mean":
        means, counts = prototypes(embeddings, labels, way)
        return {"prototypes": means, "counts": counts}
    return {"support": embeddings, "members": one_hot(labels, way, embeddings.dtype)}


def recall(
    state: dict[str, Tensor], query: Tensor, distance: Distance, answer: str, class_by_class: bool = True
) -> Tensor:
    """Logits [T, Q, way] of query embeddings [T, Q, D] from what :func:`remember` returned.

    "class_mean": minus the distance to the mean; ``class_by_class``, so that a new class changes no other's logit.
    "nearest": minus the distance to the nearest image of the class. "soft": log of the sum of exp(-distance) over the
    images of the class, whose softmax is the probability of picking a neighbour of that class (NCA).
    """
    if answer == "class_mean":
        means = state["prototypes"]
        return -(by_class(distance, query, means) if class_by_class else distance(query, means))
    combine = class_max if answer == "nearest" else class_logsumexp
    return combine(-distance(query, state["support"]), state["members"])


@in_float32
def class_max(scores: Tensor, members: Tensor) -> Tensor:
    """Largest score of every class's images: scores [T, Q, S] and members [T, S, way] give [T, Q, way]."""
    return _maxima(scores, *_bins(members))[..., :-1]


@in_float32
def class_logsumexp(scores: Tensor, members: Tensor) -> Tensor:
    """log sum exp of the scores of every class's images, exact far below zero too: shapes as :func:`class_max`.

    -inf for a class without images.
    """
    bins, count = _bins(members)
    largest = _maxima(scores.detach(), bins, count)
    of_items = largest.gather(-1, bins.unsqueeze(-2).expand(scores.shape))
    return ((scores - of_items).exp() @ members.to(scores.dtype)).log() + largest[..., :-1]


def _bins(members: Tensor) -> tuple[Tensor, int]:
    """The class [T, S] of every image, padding in a class of its own after the others, and how many that makes."""
    way = members.shape[-1]
    return members.argmax(-1).where(members.any(-1), way), way + 1


def _maxima(scores: Tensor, bins: Tensor, count: int) -> Tensor:
    """Scores [T, Q, S] of images in bins [T, S] to the largest of every bin [T, Q, count]."""
    lowest = scores.new_full((*scores.shape[:-1], count), -torch.inf)
    return lowest.scatter_reduce(-1, bins.unsqueeze(-2).expand(scores.shape), scores, "amax")
