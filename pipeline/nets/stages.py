"""A backbone taken apart, for methods that act on its hidden layers."""

from collections.abc import Callable
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.nets.blocks import to_format
from pipeline.nets.conv4 import Conv4
from pipeline.nets.fused_norm import wide
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
        return backbone.stages()  # type: ignore[operator]
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
        x = self.plain(x)
        if like.weight is not None:
            x = x * wide(like.weight, x)
        return x if like.bias is None else x + wide(like.bias, x)


class _Conv4Stages:
    """A layer's pre-activation is the normalised and, unless it is strided, pooled map: what the ReLU is applied to."""

    def __init__(self, backbone: Conv4) -> None:
        self.backbone, self.slope = backbone, backbone.negative_slope

    def __len__(self) -> int:
        return len(self.backbone.convs)

    def norm(self, t: int) -> BatchNorm | None:
        return self.backbone.norms[t]  # type: ignore[return-value]

    def pre_activation(self, t: int, below: Tensor, norm: Norm | None = None) -> Tensor:
        below = to_format(below, self.backbone.channels_last and t == 0)
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
        return self.backbone.layers[t](below.flatten(1))

    def features(self, last: Tensor) -> Tensor:
        return last
