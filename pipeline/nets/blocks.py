"""Blocks that several backbones share, and a second network of the same blocks."""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nets.film import Pairs, modulate
from pipeline.nets.norm import BatchNorm
from pipeline.nets.transforms import inside_transform

Activation = Callable[[Tensor], Tensor]


def leaky_relu(x: Tensor) -> Tensor:
    """With slope 0.1, as R2-D2 and MetaOptNet."""
    return F.leaky_relu(x, 0.1)


class ResidualBlock(nn.Module):
    """Three times 3x3 convolution, batch-norm and activation; before the last activation the shortcut is added.

    The block of ResNet-12 (Mishra et al. 2018; Oreshkin et al. 2018; Lee et al. 2019). The shortcut is a 1x1
    convolution with batch-norm. Convolutions have no bias and leave the size as it is. Modulation comes between
    batch-norm and activation, and not on the shortcut.
    """

    def __init__(
        self, channels: int, width: int, activation: Activation, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        inputs = (channels, width, width)
        self.activation = activation
        self.convs = nn.ModuleList(nn.Conv2d(i, width, 3, padding=1, bias=False) for i in inputs)
        self.norms = nn.ModuleList(BatchNorm(width, eps=eps, momentum=momentum) for _ in inputs)
        self.shortcut = nn.Conv2d(channels, width, 1, bias=False)
        self.shortcut_norm = BatchNorm(width, eps=eps, momentum=momentum)

    def forward(self, x: Tensor, pairs: Pairs) -> Tensor:
        """[N, channels, H, W] -> [N, width, H, W]."""
        h, last = x, len(self.convs) - 1
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = modulate(norm(conv(h)), pairs)
            h = self.activation(h) if number < last else h
        return self.activation(h + self.shortcut_norm(self.shortcut(x)))


def drop_block(x: Tensor, rate: Tensor | float, size: int) -> Tensor:
    """Zero squares of the map of every channel of x [N, C, H, W] (DropBlock, Ghiasi et al. 2018), each where it fits.

    Args:
        rate: expected share of zeros, overlaps not considered; a tensor [] costs no wait for the device.
        size: side of the squares, no longer than the map's.

    What is left is scaled so that the whole keeps its mean, by one factor for the batch.
    """
    height, width = x.shape[-2:]
    size = min(size, height, width)
    down, right = height - size + 1, width - size + 1
    chance = rate / size**2 * (height * width) / (down * right)
    corners = torch.rand(*x.shape[:-2], down, right, device=x.device) < chance
    kept = 1 - F.max_pool2d(F.pad(corners.to(x.dtype), [size - 1] * 4), size, stride=1)
    left = kept.sum(dtype=torch.promote_types(x.dtype, torch.float32))
    return x * kept * (kept.numel() / left.clamp(min=1))


def per_coordinate(inputs: int, units: int) -> nn.Sequential:
    """Three layers with ReLU between them: [..., inputs] to [..., 1]."""
    return nn.Sequential(nn.Linear(inputs, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, 1))


@torch.no_grad()
def fresh_copy(module: nn.Module) -> nn.Module:
    """A copy of a newly initialised ``module`` with a start of its own.

    The values of every weight matrix and kernel are shuffled: entries drawn independently from one distribution are
    again such a draw, whatever the distribution was.
    """
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        if parameter.ndim > 1:
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
    return other


def to_format(images: Tensor, channels_last: bool) -> Tensor:
    """Images in the memory format that convolutions are fastest with; ``vmap`` knows no memory formats."""
    return images.to(memory_format=torch.channels_last) if channels_last and not inside_transform() else images


def normal_fan_out(module: nn.Module, gain: float = 1.0) -> None:
    """Every convolution from N(0, gain * 2 / fan_out), the second being the variance (He et al. 2015); biases 0."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
            nn.init.normal_(conv.weight, std=(gain * 2 / fan_out) ** 0.5)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


def sizes_after(size: Sequence[int], halvings: int) -> list[int]:
    """Height and width after so many poolings of 2x2 that drop an odd rest."""
    return [s // 2**halvings for s in size]
