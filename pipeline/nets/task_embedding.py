"""The task embedding network: from what a task looks like to how features are modulated for it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.functional.precision import in_float32

LAYERS = 3


class TaskEmbedding(nn.Module):
    """Gain and shift of every modulated layer, each from a fully connected network of its own (Oreshkin et al. 2018).

    A network has three layers as wide as the modulated layer: x W + b, then twice h W + b + h, with swish after the
    first two. A scalar that starts at 0 multiplies what comes out, so that training begins without modulation.

    Args:
        features: D of a task's representation.
        widths: channels of every modulated layer.
    """

    def __init__(self, features: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        counts = {width: self.widths.count(width) for width in self.widths}
        self.nets = nn.ModuleDict({str(width): _Networks(features, width, 2 * n) for width, n in counts.items()})

    def place(self, layer: int, kind: str) -> int:
        """Which of the networks of a layer's width makes its "gamma" or "beta"."""
        return 2 * self.widths[:layer].count(self.widths[layer]) + ("gamma", "beta").index(kind)

    @in_float32
    def forward(self, task: Tensor) -> tuple[Tensor, Tensor]:
        """[T, D] -> gamma and beta, [T, sum(widths)] each."""
        made = {width: self.nets[str(width)](task) for width in dict.fromkeys(self.widths)}
        gamma, beta = (
            torch.cat([made[width][self.place(layer, kind)] for layer, width in enumerate(self.widths)], dim=1)
            for kind in ("gamma", "beta")
        )
        return gamma, beta

    def weights(self) -> list[nn.Parameter]:
        """The matrices, without biases and multipliers."""
        return [p for name, p in self.named_parameters() if ".weights." in name]

    def multipliers(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name.endswith(".multiplier")]


class _Networks(nn.Module):
    """``count`` networks of the same width, computed together; weights are [count, in, out]."""

    def __init__(self, features: int, width: int, count: int) -> None:
        super().__init__()
        sizes = [features, *[width] * (LAYERS - 1)]
        std = (0.1 * 2 / width) ** 0.5  # variance 0.1 * 2 / fan_out
        self.weights = nn.ParameterList(torch.empty(count, size, width).normal_(std=std) for size in sizes)
        self.biases = nn.ParameterList(torch.zeros(count, 1, width) for _ in sizes)
        self.multiplier = nn.Parameter(torch.zeros(count, 1, 1))

    def forward(self, task: Tensor) -> Tensor:
        """[T, D] -> [count, T, width]."""
        h = task.expand(len(self.multiplier), -1, -1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            out = torch.baddbmm(bias, h, weight)
            h = out if layer == 0 else out + h
            h = F.silu(h) if layer < LAYERS - 1 else h
        return self.multiplier * h
