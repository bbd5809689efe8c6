"""Triplet loss with semi-hard mining (FaceNet: Schroff, Kalenichenko & Philbin 2015)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Episodes
from pipeline.errors import PipelineError
from pipeline.functional.directions import unit
from pipeline.functional.distances import euclidean, squared_euclidean
from pipeline.functional.losses import accuracy
from pipeline.functional.neighbours import recall, remember
from pipeline.functional.triplets import MININGS, REDUCTIONS, mine, reduce
from pipeline.methods.base import Method, State, embed
from pipeline.nets.by_name import choose


class Triplet(Method):
    """An image is nearer to images of its class than to others by a margin: max(0, d_ap - d_an + alpha) (equation 1).

    The triplets are mined among the support and query images of a task together: a task of P ways with K images a class
    is the P x K batch of metric learning. There are no published figures on few-shot tasks.

    Args:
        backbone: the features.
        mining: "semi_hard", "facenet", "sandberg", "batch_all" or "batch_hard":
            see :func:`pipeline.functional.triplets.mine`.
        margin: alpha.
        squared: squared Euclidean distances as in the paper; false: not squared (tensorflow-addons, margin 1).
        reduction: "mean" over the triplets of a task, "sum" (equation 3), or "mean_nonzero" over those above 0.
        normalise: embeddings have unit length.
        embedding_dim: width of a linear layer after the backbone (128 in the paper); None: the features themselves.
        answer: a query is of the class with the nearest mean embedding, "class_mean", or of the "nearest" image's.
    """

    embeds_once = True

    def __init__(
        self,
        backbone: nn.Module,
        mining: str = "semi_hard",
        margin: float = 0.2,
        squared: bool = True,
        reduction: str = "mean",
        normalise: bool = True,
        embedding_dim: int | None = None,
        answer: str = "class_mean",
    ) -> None:
        super().__init__(backbone)
        self.mining, self.margin = choose("mining", mining, MININGS), margin
        self.reduction = choose("reduction", reduction, REDUCTIONS)
        self.answer = choose("answer", answer, ("class_mean", "nearest"))
        self.distance = squared_euclidean if squared else euclidean
        self.normalise = normalise
        features = int(backbone.out_features)  # type: ignore[arg-type]
        self.embedding = nn.Identity() if embedding_dim is None else nn.Linear(features, embedding_dim)

    def adapt(self, support: Tensor, labels: Tensor, way: int | None = None) -> State:
        """For class means: prototypes [T, way, D] and counts; otherwise the embedded support and its members."""
        way = self.check_support(labels, way)
        return remember(self._embed(support), labels, way, self.answer)

    def classify(self, state: State, query: Tensor) -> Tensor:
        """Minus the distance to the class's mean or nearest image."""
        return recall(state, self._embed(query), self.distance, self.answer, class_by_class=not self.training)

    def extend(self, state: State, support: Tensor, labels: Tensor) -> State | None:
        """More class means; a nearest image is found anew."""
        if self.answer != "class_mean":
            return None
        known = state["prototypes"].shape[1]
        if int(labels.min()) < known:
            raise PipelineError(f"new classes are numbered from {known}, the number of classes already known")
        new = self.adapt(support, labels - known)
        return {key: torch.cat([state[key], new[key]], dim=1) for key in state}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over tasks of their triplets' loss; ``active`` is the share of triplets that still have one."""
        assert isinstance(batch, Episodes)
        images = torch.cat([batch.support, batch.query], dim=1)
        labels = torch.cat([batch.support_labels, batch.query_labels], dim=1)
        embeddings = self._embed(images)
        mined = mine(self.distance(embeddings, embeddings), labels, self.mining, self.margin)
        with torch.no_grad():
            support, query = embeddings.split([batch.support.shape[1], batch.query.shape[1]], dim=1)
            state = remember(support, batch.support_labels, batch.way, self.answer)
            logits = recall(state, query, self.distance, self.answer, class_by_class=False)
        active = mined.active.sum() / mined.triplets.sum().clamp(min=1)
        return reduce(mined, self.reduction).mean(), {
            "accuracy": accuracy(logits, batch.query_labels),
            "active": active,
        }

    def _embed(self, images: Tensor) -> Tensor:
        """[T, N, C, H, W] -> [T, N, D]."""
        found = self.embedding(embed(self.backbone, images))
        return unit(found) if self.normalise else found
