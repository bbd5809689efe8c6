"""Random views of a support set: its images shifted, mirrored and recoloured, by numbers that are drawn beforehand.

The numbers belong to the place of an image in its support set. So they are the same for every task, and what a task
learns depends neither on the tasks beside it nor on the padding behind its images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def drawn(images: int, views: int, numbers: int, seed: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), [views, images, numbers]; those of an image do not depend on how many there are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, views, numbers, generator=generator, dtype=torch.float64).transpose(0, 1)


def shifted(images: Tensor, draws: Tensor, padding: int, flip: bool = True) -> Tensor:
    """Padded with zeros, cropped to their size, and mirrored half of the time: [..., S, C, H, W] of the same shape.

    Args:
        draws: [S, 3] in [0, 1): how far down, how far to the right, and whether mirrored.
        padding: pixels an image can be shifted by.
    """
    height, width = images.shape[-2:]
    draws = draws.to(images.device)
    top, left = (draws[:, :2] * (2 * padding + 1)).long().unbind(-1)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(len(draws), -1)
    if flip:
        columns = columns.where(draws[:, 2:] < 0.5, width - 1 - columns)
    padded = F.pad(images, (padding, padding, padding, padding))
    before = [1] * (images.ndim - 4)
    cut = torch.take_along_dim(padded, rows.view(*before, -1, 1, height, 1), dim=-2)
    return torch.take_along_dim(cut, (left[:, None] + columns).view(*before, -1, 1, 1, width), dim=-1)


def recoloured(images: Tensor, draws: Tensor) -> Tensor:
    """Brightness, then saturation, then contrast changed (DiffAugment: Zhao et al. 2020): [..., S, C, H, W].

    Args:
        images: with channels around 0, of about unit variance.
        draws: [S, 3] in [0, 1): up to .5 is added or taken off, colours are multiplied by up to 2, contrast by .5 to
            1.5.
    """
    brightness, saturation, contrast = draws.to(images)[..., None, None, None].unbind(1)
    images = images + (brightness - 0.5)
    grey = images.mean(-3, keepdim=True)
    images = grey + (images - grey) * 2 * saturation
    mean = images.mean((-3, -2, -1), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)
