"""Augmentation on tensors, on the device, over all images of a step at once.

Random numbers come from a generator seeded by (seed, step, rank), so a step is the same whenever it is repeated.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.philox import key_of

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's conversion to grey


@dataclass(frozen=True)
class Augmentation:
    """Which augmentations training images go through; all off by default."""

    crop_padding: int = 0  # pixels of zero padding before a random crop back to size
    flip: bool = False  # mirror horizontally with probability 1/2
    jitter: float = 0.0  # brightness, contrast and saturation drawn from [1 - jitter, 1 + jitter]
    affine: float = 0.0  # how far images are turned, sheared, stretched and shifted; 1: as by Koch et al. 2015

    @property
    def active(self) -> bool:
        return self.crop_padding > 0 or self.flip or self.jitter > 0 or self.affine > 0


def quarter_turns(images: Tensor, turns: Tensor) -> Tensor:
    """Turn every image counter-clockwise by its number of quarter turns: images [N, C, H, H], turns int64 [N]."""
    if not bool(turns.any()):
        return images
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(
            f"images of {tuple(images.shape[-2:])} pixels cannot be turned as classes: they are not square"
        )
    if images.device.type == "cpu" and images.dtype == torch.uint8:
        return torch.from_numpy(_turn_bytes(images.numpy(), turns.numpy()))
    out = images.clone()
    for turn in (1, 2, 3):
        where = (turns == turn).nonzero().squeeze(1)
        if len(where):
            out[where] = torch.rot90(images[where], turn, (2, 3))
    return out


def _turn_bytes(images: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """The same on a CPU, four times as fast: images of one turn side by side, and NumPy's copies of views of bytes."""
    order = np.argsort(turns, kind="stable")
    ends = np.searchsorted(turns[order], [1, 2, 3])
    source = images[order]
    turned, out = np.empty_like(source), np.empty_like(source)
    parts = zip(np.split(source, ends), np.split(turned, ends), strict=True)
    for turn, (old, new) in enumerate(parts):
        new[:] = np.rot90(old, turn, (2, 3))
    out[order] = turned
    return out


def augment(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Random affine maps, crop, flip and colour jitter: uint8 [N, C, H, W] to uint8 [N, C, H, W]."""
    if how.affine:
        images = _affine(images, how.affine, generator)
    if how.crop_padding:
        images = _random_crop(images, how.crop_padding, generator)
    if how.flip:
        mirrored = torch.rand(len(images), generator=generator, device=images.device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    if how.jitter:
        images = _colour_jitter(images, how.jitter, generator)
    return images


def step_generator(device: torch.device | str, *parts: object) -> torch.Generator:
    """A generator whose state depends on ``parts`` (seed, step, rank, purpose) alone."""
    low, high = key_of(*parts)
    return torch.Generator(device=device).manual_seed((high << 31 ^ low) & 0x7FFFFFFFFFFFFFFF)


def _affine(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """As Koch et al. (2015): a turn of up to 10 degrees, shears of .3, stretches between .8 and 1.2, and shifts of 2 in
    105 pixels, along either axis, all times ``strength``; each of the seven is there one time in two. What comes in
    from outside has the nearest pixel's colour.
    """
    n, _, height, width = images.shape
    most = torch.tensor([math.radians(10), 0.3, 0.3, 0.2, 0.2, 2 * 2 / 105, 2 * 2 / 105])[:, None]
    there, drawn = torch.rand((2, 7, n), generator=generator, device=images.device)
    turn, shear_x, shear_y, stretch_x, stretch_y, x, y = (there < 0.5) * (2 * drawn - 1) * most.to(drawn) * strength
    one, sine, cosine = torch.ones_like(turn), turn.sin(), turn.cos()
    turned = torch.stack([cosine, -sine, sine, cosine], 1).unflatten(1, (2, 2))
    sheared = torch.stack([one, shear_x, shear_y, one], 1).unflatten(1, (2, 2))
    stretched = torch.stack([1 + stretch_x, 1 + stretch_y], 1).diag_embed()
    aspect = torch.tensor([[1, height / width], [width / height, 1]]).to(drawn)  # of a grid with sides of length 2
    maps = torch.cat([turned @ sheared @ stretched * aspect, torch.stack([x, y], 1)[..., None]], 2)
    grid = F.affine_grid(maps, [n, 1, height, width], align_corners=False)
    moved = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return moved.round().to(torch.uint8)


def _random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    n, _, height, width = images.shape
    padded = F.pad(images, (padding, padding, padding, padding))
    top, left = torch.randint(0, 2 * padding + 1, (2, n), generator=generator, device=images.device)
    y = top[:, None] + torch.arange(height, device=images.device)  # [N, H]
    x = left[:, None] + torch.arange(width, device=images.device)  # [N, W]
    index = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _colour_jitter(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Brightness, then contrast, then saturation, each about its own grey, clamped between as 8-bit images are."""
    n, channels = images.shape[:2]
    factors = 1 + strength * (2 * torch.rand((3, n, 1, 1, 1), generator=generator, device=images.device) - 1)
    x = (images.float() * factors[0]).clamp(0, 255)
    if channels == 3:
        luma = torch.tensor(_LUMA, device=images.device).view(1, 3, 1, 1)
        grey_mean = (x * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    else:
        grey_mean = x.mean((1, 2, 3), keepdim=True)
    x = (grey_mean + (x - grey_mean) * factors[1]).clamp(0, 255)
    if channels == 3:
        grey = (x * luma).sum(1, keepdim=True)
        x = (grey + (x - grey) * factors[2]).clamp(0, 255)
    return x.round().to(torch.uint8)
