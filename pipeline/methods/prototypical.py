"""Prototypical networks (Snell, Swersky & Zemel 2017)."""

import torch
from torch import Tensor, nn

from pipeline.functional.distances import DISTANCES, by_class
from pipeline.functional.prototypes import prototypes
from pipeline.methods.base import State
from pipeline.methods.head import ClassMeans, HeadMethod
from pipeline.nets.by_name import choose


class Prototypical(HeadMethod):
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

    extendable = True

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

    def fit(self, features: Tensor, labels: Tensor, way: int) -> State:
        """prototypes [T, way, D] and the counts [T, way] of images behind them."""
        means, counts = prototypes(features, labels, way)
        return {"prototypes": means, "counts": counts}

    def scores(self, state: State, query: Tensor) -> Tensor:
        """-alpha d(f(x), c)."""
        if self.training:
            return -self.scale * self.distance(query, state["prototypes"])
        return -self.scale * by_class(self.distance, query, state["prototypes"])  # so that `extend` touches no class

    def distances(self, logits: Tensor) -> Tensor | None:
        return None if self.distance is DISTANCES["dot"] else -logits

    def class_means(self) -> ClassMeans:
        name = next(name for name, distance in DISTANCES.items() if distance is self.distance)
        return ClassMeans(name, self.scale.item())
