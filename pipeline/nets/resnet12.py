"""ResNet-12 as MetaOptNet has it."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.nets.base import Backbone, Shape
from pipeline.nets.blocks import ResidualBlock, drop_block, leaky_relu, normal_fan_out, sizes_after, to_format
from pipeline.nets.film import Film
from pipeline.nets.transforms import inside_transform


class ResNet12(Backbone):
    """Four residual blocks with leaky ReLU, each followed by 2x2 max-pooling (Lee et al. 2019, section 4.1).

    84x84 images become 640 x 5 x 5 = 16,000 features; 12.4 million parameters. While training, ``drop`` of the
    features are left out: single ones after every block but the last two, squares (DropBlock) after those, with a rate
    that rises from 0 over ``drop_ramp`` forward passes.

    Args:
        widths: filters of every block.
        drop: share of features left out after a block; 0 for none.
        drop_size: side of the squares: 5 for 84x84 images, 2 for 32x32; no longer than the map.
        drop_ramp: forward passes until DropBlock has its full rate. The official code counts those of evaluation too
            (two thirds of all), and support and queries are two passes of a step.
        average: average the last map over space, instead of taking all of it.
        eps, momentum: of batch-norm.
        channels_last: memory format of the activations.
    """

    forwards: Tensor

    def __init__(
        self,
        shape: Shape,
        widths: Sequence[int] = (64, 160, 320, 640),
        drop: float = 0.1,
        drop_size: int = 5,
        drop_ramp: int = 40000,
        average: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= drop < 1 or drop_size < 1 or drop_ramp < 1:
            raise PipelineError(
                f"drop={drop}, drop_size={drop_size}, drop_ramp={drop_ramp}: drop in [0, 1), others >= 1"
            )
        size = sizes_after(shape[1:], len(widths))
        if min(size) < 1:
            raise PipelineError(
                f"resnet12 with {len(widths)} blocks halves images of {shape[1]}x{shape[2]} to nothing: "
                f"resize them to at least {2 ** len(widths)}x{2 ** len(widths)}"
            )
        self.drop, self.drop_size, self.drop_ramp = drop, drop_size, drop_ramp
        self.average, self.channels_last = average, channels_last
        channels = pairwise([shape[0], *widths])
        self.blocks = nn.ModuleList(ResidualBlock(i, o, leaky_relu, eps, momentum) for i, o in channels)
        normal_fan_out(self)
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))  # in training: where the ramp has got to
        self.film_widths = tuple(width for width in widths for _ in range(3))
        self.out_features = widths[-1] if average else widths[-1] * size[0] * size[1]

    def forward(self, images: Tensor, film: Film = ()) -> Tensor:
        x, pairs = to_format(images, self.channels_last), iter(film)
        if self.training and not inside_transform():  # a mapped function has no place to count
            self.forwards += 1
        rate = self.drop * (self.forwards / self.drop_ramp).clamp(max=1)
        for left, block in zip(reversed(range(len(self.blocks))), self.blocks, strict=True):
            x = F.max_pool2d(block(x, pairs), 2)
            if self.training and self.drop:
                x = F.dropout(x, self.drop) if left >= 2 else drop_block(x, rate, self.drop_size)
        return x.mean((2, 3)) if self.average else x.flatten(1)
