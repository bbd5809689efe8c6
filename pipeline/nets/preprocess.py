"""From stored bytes to what a backbone takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.nets.by_name import choose


class Preprocess(nn.Module):
    """uint8 images [..., C, H, W] to float of the same shape.

    Args:
        scaling: "unit": x / 255. "standard": (x / 255 - mean) / std per channel. "none": 0..255 (as TADAM, whose first
            batch-norm absorbs the scale).
        mean, std: per channel, of pixels in 0..1; needed for "standard" only.
    """

    factor: Tensor
    gain: Tensor
    shift: Tensor

    def __init__(
        self, scaling: str = "unit", mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.scaling = choose("scaling", scaling, ("unit", "standard", "none"))
        self.register_buffer("factor", torch.tensor(1.0), persistent=False)
        if scaling == "standard":
            if mean is None or std is None or len(mean) != len(std) or min(std) <= 0:
                raise PipelineError("scaling=standard needs a mean and a positive std for every channel")
            deviation = torch.tensor(list(std)).view(-1, 1, 1)
            self.register_buffer("gain", 1 / (255 * deviation), persistent=False)
            self.register_buffer("shift", -torch.tensor(list(mean)).view(-1, 1, 1) / deviation, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            raise PipelineError(f"images must be uint8 before preprocessing, not {images.dtype}")
        x = images.to(self.factor.dtype)
        if self.scaling == "unit":
            return x.div_(255)
        return x.mul_(self.gain).add_(self.shift) if self.scaling == "standard" else x
