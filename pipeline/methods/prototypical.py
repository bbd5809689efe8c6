"""Prototypical networks (Snell, Swersky & Zemel 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Episodes
from pipeline.errors import PipelineError
from pipeline.functional.distances import DISTANCES, by_class
from pipeline.functional.losses import accuracy, cross_entropy
from pipeline.functional.prototypes import prototypes
from pipeline.methods.base import Method, State, embed
from pipeline.nets.by_name import choose


class Prototypical(Method):
    """A class is the mean of its embedded support images; a query belongs to the nearest (equations 1 and 2).

    Args:
        backbone: the embedding f.
        distance: "squared_euclidean" (the paper's; its published 98.8 / 99.7 / 96.0 / 98.9 on Omniglot), "euclidean"
            (TADAM's prototypical head), "cosine" or "dot".
        scale: alpha, which multiplies the distance: logits = -alpha d(f(x), c) (TADAM, equation 2; 1 in Snell).
        learn_scale: train alpha with the network.
        joint_forward: while training, embed support and query in one call, so that batch-norm sees both (Snell's
            code); false embeds them apart, as at test.
    """

    embeds_once = True

    def __init__(
        self,
        backbone: nn.Module,
        distance: str = "squared_euclidean",
        scale: float = 1.0,
        learn_scale: bool = False,
        joint_forward: bool = True,
    ) -> None:
        super().__init__(backbone)
        self.distance = DISTANCES[choose("distance", distance, DISTANCES)]
        self.scale = nn.Parameter(torch.tensor(float(scale)), requires_grad=learn_scale)
        self.joint_forward = joint_forward

    def adapt(self, support: Tensor, labels: Tensor, way: int | None = None) -> State:
        """prototypes [T, way, D] and the counts [T, way] of images behind them."""
        way = self.check_support(labels, way)
        return self._state(embed(self.backbone, support), labels, way)

    def classify(self, state: State, query: Tensor) -> Tensor:
        return self._logits(state, embed(self.backbone, query))

    def extend(self, state: State, support: Tensor, labels: Tensor) -> State:
        known = state["prototypes"].shape[1]
        if int(labels.min()) < known:
            raise PipelineError(f"new classes are numbered from {known}, the number of classes already known")
        new = self.adapt(support, labels - known)
        return {key: torch.cat([state[key], new[key]], dim=1) for key in state}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over all queries of -log softmax(-alpha d) at the true class."""
        if not self.joint_forward:
            return super().loss(batch)
        assert isinstance(batch, Episodes)
        images = torch.cat([batch.support, batch.query], dim=1)
        support, query = embed(self.backbone, images).split([batch.support.shape[1], batch.query.shape[1]], dim=1)
        logits = self._logits(self._state(support, batch.support_labels, batch.way), query)
        return cross_entropy(logits, batch.query_labels), {"accuracy": accuracy(logits, batch.query_labels)}

    def _state(self, embeddings: Tensor, labels: Tensor, way: int) -> State:
        means, counts = prototypes(embeddings, labels, way)
        return {"prototypes": means, "counts": counts}

    def _logits(self, state: State, query: Tensor) -> Tensor:
        """[T, way, D] prototypes and query embeddings [T, Q, D] -> [T, Q, way]."""
        if self.training:
            return -self.scale * self.distance(query, state["prototypes"])
        return -self.scale * by_class(self.distance, query, state["prototypes"])  # so that `extend` touches no class
