"""A backbone taken apart, for methods that act on its hidden layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.nets.conv4 import Conv4
from pipeline.nets.mlp import MLP
from pipeline.nets.norm import BatchNorm

Norm = Callable[[Tensor], Tensor]


class Stages(Protocol):
    """Hidden layers t = 0, 1, ...: with h_0 the images and h_{t+1} = sigma(pre_activation(t, h_t)), the backbone's
    output is features(h) of the last h. A backbone of one's own returns such an object from a method ``stages()``."""

    @property
    def slope(self) -> float:
        """Of sigma below 0, where it is a leaky ReLU; 0 for ReLU."""

    def __len__(self) -> int: ...

    def norm(self, t: int) -> BatchNorm | None:
        """The batch-norm of layer t."""

    def pre_activation(self, t: int, below: Tensor, norm: Norm | None = None) -> Tensor:
        """a_t [N, ...] from what lies below, with another ``norm`` in place of the layer's own."""

    def features(self, last: Tensor) -> Tensor:
        """[N, out_features] from the last layer's activations."""


def stages(backbone: nn.Module) -> Stages:
    """The stages of a backbone.

    Raises:
        PipelineError: a backbone of another kind.
    """
    if isinstance(backbone, Conv4):
        return _Conv4Stages(backbone)
    if isinstance(backbone, MLP):
        return _MLPStages(backbone)
    if callable(getattr(backbone, "stages", None)):
        found: Stages = backbone.stages()  # type: ignore[operator]
        return found
    raise PipelineError(
        f"backbone {type(backbone).__name__} cannot be taken apart into layers: choose backbone=conv4 or mlp"
    )


class OtherStatistics(nn.Module):
    """A batch-norm layer's gain and bias with running averages of its own, where the layer is used on activations of
    two distributions."""

    def __init__(self, like: BatchNorm) -> None:
        super().__init__()
        statistics = "batch" if like.running else "batch_statistics"
        self.plain = BatchNorm(like.channels, statistics, "none", like.eps, like.momentum)

    def forward(self, x: Tensor, like: BatchNorm) -> Tensor:
        """x [N, C, ...] as ``like`` would normalise it, but for the averages."""
        x, shape = self.plain(x), (-1, *[1] * (x.ndim - 2))
        if like.weight is not None:
            x = x * like.weight.view(shape)
        return x if like.bias is None else x + like.bias.view(shape)


class _Conv4Stages:
    """A layer's pre-activation is the normalised and, unless it is strided, pooled map: what the ReLU is applied to."""

    def __init__(self, backbone: Conv4) -> None:
        self.backbone, self.slope = backbone, backbone.negative_slope

    def __len__(self) -> int:
        return len(self.backbone.convs)

    def norm(self, t: int) -> BatchNorm | None:
        return self.backbone.norms[t]  # type: ignore[return-value]

    def pre_activation(self, t: int, below: Tensor, norm: Norm | None = None) -> Tensor:
        if t == 0 and self.backbone.channels_last:
            below = below.to(memory_format=torch.channels_last)
        x = (norm or self.backbone.norms[t])(self.backbone.convs[t](below))
        return x if self.backbone.strided else F.max_pool2d(x, 2, ceil_mode=self.backbone.same_padding)

    def features(self, last: Tensor) -> Tensor:
        return last.mean((2, 3)) if self.backbone.average else last.flatten(1)


class _MLPStages:
    slope = 0.0

    def __init__(self, backbone: MLP) -> None:
        self.backbone = backbone

    def __len__(self) -> int:
        return len(self.backbone.layers)

    def norm(self, t: int) -> BatchNorm | None:
        return None

    def pre_activation(self, t: int, below: Tensor, norm: Norm | None = None) -> Tensor:
        x: Tensor = self.backbone.layers[t](below.flatten(1))
        return x

    def features(self, last: Tensor) -> Tensor:
        return last
