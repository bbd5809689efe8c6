"""Feature-wise linear modulation (Perez et al. 2018): every channel of an image gets a gain and a shift.

A backbone that can be modulated takes ``film`` beside the images and names the channels of its modulated layers, in
the order in which an image meets them, as ``film_widths``.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Film = Sequence[tuple[Tensor, Tensor]]  # (gamma, beta) of every modulated layer in turn, each [N, C]
Pairs = Iterator[tuple[Tensor, Tensor]]  # what is left of a Film while an image goes through the network


def modulate(h: Tensor, pairs: Pairs) -> Tensor:
    """(1 + gamma) h + beta for h [N, C, H, W] with the next pair; h itself where none is left."""
    gamma, beta = next(pairs, (None, None))
    if gamma is None or beta is None:
        return h
    gain, shift = (v.to(h.dtype)[..., None, None] for v in (1 + gamma, beta))
    return torch.addcmul(shift, h, gain)


def film_of(gamma: Tensor, beta: Tensor, widths: Sequence[int], images: int) -> Film:
    """What ``film_widths`` layers are given for ``images`` images of each of T tasks, task by task.

    Args:
        gamma, beta: [T, sum(widths)].
    """
    gammas, betas = (x.repeat_interleave(images, 0).split(list(widths), dim=1) for x in (gamma, beta))
    return list(zip(gammas, betas, strict=True))
