"""ResNet-12 as TADAM has it."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.nets.base import Backbone, Shape
from pipeline.nets.blocks import ResidualBlock, normal_fan_out, to_format
from pipeline.nets.film import Film


class ResNet12Tadam(Backbone):
    """Four residual blocks with swish, then the mean over space: 512 features (Oreshkin et al. 2018, official code).

    Every convolution but the shortcuts can be modulated by the task.

    Args:
        shape: (C, H, W) of the images, of any size: an odd map is padded before pooling, as TensorFlow does.
        widths: filters of every block.
        num_max_pools: how many blocks are followed by 2x2 max-pooling: 3 in the code that made the published numbers
            (84x84 images end in 11x11), 4 in the paper's text.
        eps: of batch-norm.
        momentum: share of a new batch in batch-norm's running averages; TensorFlow's .95 is the share of the old.
        channels_last: memory format of the activations.
    """

    def __init__(
        self,
        shape: Shape,
        widths: Sequence[int] = (64, 128, 256, 512),
        num_max_pools: int = 3,
        eps: float = 1e-3,
        momentum: float = 0.05,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= num_max_pools <= len(widths):
            raise PipelineError(f"num_max_pools={num_max_pools}: give a number of 0..{len(widths)}, the blocks")
        self.num_max_pools, self.channels_last = num_max_pools, channels_last
        channels = pairwise([shape[0], *widths])
        self.blocks = nn.ModuleList(ResidualBlock(i, o, F.silu, eps, momentum) for i, o in channels)
        normal_fan_out(self, gain=0.1)
        self.film_widths = tuple(width for width in widths for _ in range(3))
        self.out_features = widths[-1]

    def forward(self, images: Tensor, film: Film = ()) -> Tensor:
        x, pairs = to_format(images, self.channels_last), iter(film)
        for number, block in enumerate(self.blocks):
            x = block(x, pairs)
            if number < self.num_max_pools:
                x = F.max_pool2d(x, 2, ceil_mode=True)
        return x.mean((2, 3))
