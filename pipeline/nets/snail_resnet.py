"""SNAIL's residual network for mini-ImageNet."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nets.base import Backbone, Shape
from pipeline.nets.by_name import choose
from pipeline.nets.norm import BatchNorm


class SnailResNet(Backbone):
    """Four residual blocks, a 1x1 convolution, the pooled map, ReLU, dropout and a 1x1 convolution (Mishra et al. 2018,
    appendix). 84x84 images become maps of 6x6, and 384 features.

    Args:
        widths: filters of every block.
        middle: filters of the first 1x1 convolution.
        features: of the second.
        dropout: share of values that are dropped after every block and before the last convolution. The paper's .9 is
            the share that is kept; a re-implementation drops that much.
        slope: of the leaky ReLU below 0.
        pool: "mean" or, as the re-implementation, "max" over the last map.
        norm, affine, eps, momentum: see :class:`pipeline.nets.norm.BatchNorm`.
    """

    def __init__(
        self,
        shape: Shape,
        widths: Sequence[int] = (64, 96, 128, 256),
        middle: int = 2048,
        features: int = 384,
        dropout: float = 0.1,
        slope: float = 0.1,
        pool: str = "mean",
        norm: str = "batch",
        affine: str = "full",
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.pool = choose("pool", pool, ("mean", "max"))
        channels = shape[0]
        self.blocks = nn.ModuleList()
        for width in widths:
            norms = [BatchNorm(width, norm, affine, eps, momentum) for _ in range(3)]
            self.blocks.append(_Block(channels, width, norms, dropout, slope))
            channels = width
        self.expand, self.project = nn.Linear(channels, middle, bias=False), nn.Linear(middle, features, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.out_features = features

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for block in self.blocks:
            x = block(x)
        # A 1x1 convolution and a mean commute.
        x = self.expand(x.mean((2, 3))) if self.pool == "mean" else self.expand(x.flatten(2).mT).amax(1)
        return self.project(self.dropout(F.relu(x)))


class _Block(nn.Module):
    """Three times 3x3 convolution, batch-norm and leaky ReLU, plus a 1x1 convolution of the input; 2x2 max-pooling that
    keeps an odd last row, and dropout."""

    def __init__(self, channels: int, width: int, norms: Sequence[nn.Module], dropout: float, slope: float) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, width, 3, padding=1, bias=False) for i in (channels, width, width))
        self.norms = nn.ModuleList(norms)
        self.shortcut = nn.Conv2d(channels, width, 1, bias=False)
        self.dropout, self.slope = nn.Dropout(dropout), slope

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = F.leaky_relu(norm(conv(y)), self.slope)
        return self.dropout(F.max_pool2d(y + self.shortcut(x), 2, ceil_mode=True))
