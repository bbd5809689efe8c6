"""The encoder of relation networks, which keeps feature maps."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.nets.base import Backbone, Shape
from pipeline.nets.blocks import normal_fan_out, to_format
from pipeline.nets.by_name import choose
from pipeline.nets.norm import BatchNorm


class RelationEncoder(Backbone):
    """Four blocks of 3x3 convolution, batch-norm and ReLU; the first two without padding and with 2x2 max-pooling.

    28x28 images become maps of 5x5, 84x84 become 19x19 (Sung et al. 2018, section 3.4). Maps are returned flat, as
    every backbone's features; ``map_shape`` says how to unflatten them.

    Args:
        width: filters of every block.
        norm, affine, eps, momentum: see :class:`pipeline.nets.norm.BatchNorm`.
        bias: whether convolutions have a bias, as in the official code. Batch-norm cancels it.
        init: "official": N(0, 2 / (9 width)), as the official code. "torch": PyTorch's default.
        channels_last: memory format of the activations; 1.5 times as fast on CPU.
    """

    def __init__(
        self,
        shape: Shape,
        width: int = 64,
        norm: str = "batch",
        affine: str = "full",
        eps: float = 1e-5,
        momentum: float = 0.1,
        bias: bool = False,
        init: str = "official",
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        choose("init", init, ("official", "torch"))
        channels, *size = shape
        self.channels_last = channels_last
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for padding in (0, 0, 1, 1):
            conv = nn.Conv2d(channels, width, 3, padding=padding, bias=bias)
            if init == "official":
                normal_fan_out(conv)
            self.convs.append(conv)
            self.norms.append(BatchNorm(width, norm, affine, eps, momentum))
            size, channels = size if padding else [(s - 2) // 2 for s in size], width
        if min(size) < 1:
            raise PipelineError(
                f"relation_encoder leaves nothing of images of {shape[1]}x{shape[2]}: resize them to at least 10x10"
            )
        self.map_shape = (width, size[0], size[1])
        self.out_features = math.prod(self.map_shape)

    def forward(self, images: Tensor) -> Tensor:
        x = to_format(images, self.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
            x = F.relu(x if conv.padding == (1, 1) else F.max_pool2d(x, 2))
        return x.flatten(1)
