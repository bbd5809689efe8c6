"""SimpleShot (Wang, Chao, Weinberger & van der Maaten 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.functional.distances import unit
from pipeline.functional.heads import Prototype
from pipeline.methods.base import State
from pipeline.methods.head import ClassicalMethod
from pipeline.nets.by_name import choose


class SimpleShot(ClassicalMethod):
    """The nearest class mean, of features that are centred on those of the training images and have unit length (CL2N).

    Published for Conv-4 on 5-way mini-ImageNet, with 1 / 5 shots: 49.69 / 66.92.

    Args:
        backbone: the features.
        classes: number of training classes, of which a linear classifier is trained.
        centring: at test, on the mean of the training images' features, "train_mean"; "none": not.
        normalise: features have unit length at test.
    """

    extendable = True
    mean: Tensor

    def __init__(self, backbone: nn.Module, classes: int, centring: str = "train_mean", normalise: bool = True) -> None:
        super().__init__(backbone)
        features = int(backbone.out_features)  # type: ignore[arg-type]
        self.classifier = nn.Linear(features, classes)
        self.register_buffer("mean", torch.zeros(features))
        self.centred = choose("centring", centring, ("train_mean", "none")) == "train_mean"
        self.normalise, self.nearest = normalise, Prototype()

    def summarise(self, features: Tensor, labels: Tensor) -> Tensor:
        return features.double().sum(0)

    def keep_summary(self, total: Tensor, images: int) -> None:
        self.mean.copy_(total / images)

    def fit(self, features: Tensor, labels: Tensor, way: int) -> State:
        return self.nearest.fit(self._transformed(features), labels, way)

    def scores(self, state: State, query: Tensor) -> Tensor:
        return self.nearest.scores(state, self._transformed(query))

    def _transformed(self, features: Tensor) -> Tensor:
        centred = features - self.mean if self.centred else features
        return unit(centred) if self.normalise else centred
