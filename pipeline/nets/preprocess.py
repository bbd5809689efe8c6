"""From stored bytes to what a backbone takes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.nets.by_name import choose

FEATURES = "features"
NORMALISING = ("standard", "backbone")


class Preprocess(nn.Module):
    """uint8 images [..., C, H, W] to float; of the same shape, but where the backbone asks for another.

    Args:
        scaling: "unit": x / 255. "standard": (x / 255 - mean) / std per channel. "none": 0..255 (as TADAM, whose first
            batch-norm absorbs the scale). "backbone": the short side is resized to size / crop, the centre cut out, and
            that taken as "standard"; grey images for a network of colours get its channels.
            "features": float32 [..., D, 1, 1] of a network that was used before, as they are.
        mean, std: per channel, of pixels in 0..1; needed for "standard" and "backbone" only.
        size: [H, W] of the result.
        crop: share of the short side that the cut leaves.
        interpolation: "bilinear" or "bicubic", with the neighbourhood that a smaller picture needs (antialias).
    """

    factor: Tensor
    gain: Tensor
    shift: Tensor

    def __init__(
        self,
        scaling: str = "unit",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: Sequence[int] | None = None,
        crop: float = 1.0,
        interpolation: str = "bicubic",
    ) -> None:
        super().__init__()
        self.scaling = choose("scaling", scaling, ("unit", "standard", "none", "backbone", FEATURES))
        self.interpolation = choose("interpolation", interpolation, ("bilinear", "bicubic"))
        self.size = None if size is None else (int(size[0]), int(size[-1]))
        self.crop = crop
        self.register_buffer("factor", torch.tensor(1.0), persistent=False)
        if scaling in NORMALISING:
            if mean is None or std is None or len(mean) != len(std) or min(std) <= 0:
                raise PipelineError(f"scaling={scaling} needs a mean and a positive std for every channel")
            deviation = torch.tensor(list(std)).view(-1, 1, 1)
            self.register_buffer("gain", 1 / (255 * deviation), persistent=False)
            self.register_buffer("shift", -torch.tensor(list(mean)).view(-1, 1, 1) / deviation, persistent=False)
        if scaling == "backbone" and (size is None or len(size) != 2 or min(size) < 1 or not 0 < crop <= 1):
            raise PipelineError(f"scaling=backbone needs a size [height, width] and a crop in 0..1, not {size}, {crop}")

    def forward(self, images: Tensor) -> Tensor:
        if self.scaling == FEATURES:
            if images.dtype != torch.float32:
                raise PipelineError(f"features must be float32, not {images.dtype}: the model takes no images")
            return images
        if images.dtype != torch.uint8:
            raise PipelineError(f"images must be uint8 before preprocessing, not {images.dtype}")
        x = images.to(self.factor.dtype)
        if self.scaling == "unit":
            return x.div_(255)
        if self.scaling == "none":
            return x
        if self.scaling == "backbone":
            x = self._cut(x)
            if x.shape[-3] != len(self.gain):
                return x * self.gain + self.shift
        return x.mul_(self.gain).add_(self.shift)

    def _cut(self, x: Tensor) -> Tensor:
        """Values 0..255 [..., C, H, W] to [..., C, *size]."""
        assert self.size is not None
        height, width = self.size
        short = int(min(height, width) / self.crop + 1e-6)
        scale = short / min(x.shape[-2:])
        resized = [max(side, round(length * scale)) for side, length in zip((height, width), x.shape[-2:], strict=True)]
        flat = x.flatten(0, -4) if x.ndim > 3 else x[None]
        if resized != list(x.shape[-2:]):
            flat = F.interpolate(flat, resized, mode=self.interpolation, antialias=True).clamp_(0, 255)
        top, left = (resized[0] - height) // 2, (resized[1] - width) // 2
        cut = flat[..., top : top + height, left : left + width].contiguous()
        return cut.reshape(*x.shape[:-2], height, width)
