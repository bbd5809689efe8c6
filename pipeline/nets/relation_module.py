"""The relation module: a learnt comparison of a class's feature map with a query's."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.nets.base import Shape
from pipeline.nets.blocks import normal_fan_out
from pipeline.nets.norm import BatchNorm


class RelationModule(nn.Module):
    """g of Sung et al. 2018 (section 3.4): two blocks of 3x3 convolution, batch-norm, ReLU and 2x2 max-pooling over the
    channels of class and query together, then two linear layers. What a sigmoid makes a relation score comes out.

    Args:
        map_shape: (C, H, W) of the maps.
        width: filters of both blocks.
        hidden: width of the first linear layer.
        padding: of both convolutions; None: 0 where the maps are large enough (19x19 of 84x84 images become 3x3),
            otherwise 1 (5x5 of 28x28 images become 1x1).
        statistics: of batch-norm, see :class:`pipeline.nets.norm.BatchNorm`.
        bias: of the convolutions, as in the official code. Batch-norm cancels it.
        eps, momentum: of batch-norm.
    """

    def __init__(
        self,
        map_shape: Shape,
        width: int = 64,
        hidden: int = 8,
        padding: int | None = None,
        statistics: str = "batch_statistics",
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        channels, *size = map_shape
        self.padding = int(min(_left(s, 0) for s in size) < 1) if padding is None else padding
        left = [_left(s, self.padding) for s in size]
        if min(left) < 1:
            raise PipelineError(
                f"the relation module leaves nothing of maps of {size[0]}x{size[1]} with padding={self.padding}: "
                f"give larger images{'' if padding is None else ', method.padding=null'} or a backbone with larger maps"
            )
        self.channels = channels
        self.convs = nn.ModuleList(
            nn.Conv2d(i, width, 3, padding=self.padding, bias=bias) for i in (2 * channels, width)
        )
        self.norms = nn.ModuleList(BatchNorm(width, statistics, "full", eps, momentum) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(width * math.prod(left), hidden), nn.Linear(hidden, 1)
        normal_fan_out(self)
        for linear in (self.fc1, self.fc2):
            nn.init.normal_(linear.weight, 0, 0.01)
            nn.init.ones_(linear.bias)

    def forward(self, classes: Tensor, queries: Tensor) -> Tensor:
        """Class maps [T, W, C, H, W'] and query maps [T, Q, C, H, W'] to scores before the sigmoid [T, Q, W].

        Batch-norm sees the pairs of all T tasks as one batch.
        """
        first = self._first(classes, queries)  # [T, Q, W, C', H', W'']
        x = self._activate(0, first.flatten(0, 2))
        x = self._activate(1, self.convs[1](x))
        return self.fc2(F.relu(self.fc1(x.flatten(1)))).view(first.shape[:3])

    def _first(self, classes: Tensor, queries: Tensor) -> Tensor:
        """The first convolution of every pair's concatenated channels [class, query].

        A convolution of concatenated channels is the sum of those of its halves: W + Q convolutions instead of W * Q.
        """
        conv = self.convs[0]
        assert isinstance(conv, nn.Conv2d)
        weights = conv.weight.split(self.channels, dim=1)
        one, other = (
            F.conv2d(x.flatten(0, 1), w, bias, padding=self.padding).unflatten(0, x.shape[:2])
            for x, w, bias in zip((classes, queries), weights, (conv.bias, None), strict=True)
        )
        return one.unsqueeze(1) + other.unsqueeze(2)

    def _activate(self, index: int, x: Tensor) -> Tensor:
        return F.relu(F.max_pool2d(self.norms[index](x), 2))


def _left(size: int, padding: int) -> int:
    """What two blocks leave of ``size``."""
    for _ in range(2):
        size = (size + 2 * padding - 2) // 2
    return size
