"""Wide residual networks; WRN-28-10 by default."""

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.nets.base import Backbone, Shape
from pipeline.nets.blocks import normal_fan_out, to_format
from pipeline.nets.film import Film, Pairs, modulate
from pipeline.nets.norm import BatchNorm


class WideResNet(Backbone):
    """A convolution, three groups of residual blocks and the mean over space (Zagoruyko & Komodakis 2016, table 1).

    Batch-norm and ReLU come before the convolutions. The second and the third group begin with stride 2. WRN-28-10 has
    36.5 million parameters and 640 features; Dhillon et al. (2020) pre-train it for few-shot learning.

    Args:
        shape: (C, H, W) of the images, of any size.
        depth: number of layers, 6 n + 4.
        widen: k; the groups have 16 k, 32 k and 64 k filters.
        dropout: share of features left out between the two convolutions of a block.
        eps, momentum: of batch-norm.
        channels_last: memory format of the activations.
    """

    def __init__(
        self,
        shape: Shape,
        depth: int = 28,
        widen: int = 10,
        dropout: float = 0.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4 or widen < 1:
            raise PipelineError(
                f"depth={depth}, widen={widen}: give a depth of 6 n + 4 (10, 16, 22, 28, 40) and widen >= 1"
            )
        if not 0 <= dropout < 1:
            raise PipelineError(f"dropout={dropout}: give a share in [0, 1)")
        self.channels_last = channels_last
        self.first = nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)
        blocks, channels = [], 16
        for group in range(3):
            width = 16 * widen * 2**group
            for number in range((depth - 4) // 6):
                stride = 2 if group and number == 0 else 1
                blocks.append(_Block(channels, width, stride, dropout, eps, momentum))
                channels = width
        self.blocks = nn.ModuleList(blocks)
        self.norm = BatchNorm(channels, eps=eps, momentum=momentum)
        normal_fan_out(self)
        self.film_widths = (*(w for block in blocks for w in block.film_widths), channels)
        self.out_features = channels

    def forward(self, images: Tensor, film: Film = ()) -> Tensor:
        pairs = iter(film)
        x = self.first(to_format(images, self.channels_last))
        for block in self.blocks:
            x = block(x, pairs)
        return F.relu(modulate(self.norm(x), pairs)).mean((2, 3))


class _Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, dropout: float, eps: float, momentum: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norms = nn.ModuleList(BatchNorm(c, eps=eps, momentum=momentum) for c in (channels, width))
        self.convs = nn.ModuleList(
            nn.Conv2d(i, width, 3, stride=s, padding=1, bias=False) for i, s in ((channels, stride), (width, 1))
        )
        same = channels == width and stride == 1
        self.shortcut = None if same else nn.Conv2d(channels, width, 1, stride=stride, bias=False)
        self.film_widths = (channels, width)

    def forward(self, x: Tensor, pairs: Pairs) -> Tensor:
        """[N, channels, H, W] -> [N, width, H / stride, W / stride]."""
        h = F.relu(modulate(self.norms[0](x), pairs))
        shortcut = x if self.shortcut is None else self.shortcut(h)
        h = F.relu(modulate(self.norms[1](self.convs[0](h)), pairs))
        return shortcut + self.convs[1](F.dropout(h, self.dropout, self.training))
