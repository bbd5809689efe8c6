"""What a method is given: a batch of tasks, with labelled images beside them or not, or a batch of labelled images."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class _TensorFields:
    """Moves every tensor of a dataclass at once."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        held = {name: value for name, value in vars(self).items() if isinstance(value, Tensor | _TensorFields)}
        return replace(self, **{name: value.to(device, non_blocking=non_blocking) for name, value in held.items()})


@dataclass(frozen=True)
class Images(_TensorFields):
    """A batch of images with labels over all training classes, for classical training."""

    images: Tensor  # [B, C, H, W]
    labels: Tensor  # [B] int64 in 0..classes-1, the position of the class in its split


@dataclass(frozen=True)
class Episodes(_TensorFields):
    """T few-shot tasks with the same number of classes, support images and query images.

    Labels are relative to the task (0..way-1). The support need not be sorted by class, and classes may have
    different numbers of images.
    """

    support: Tensor  # [T, S, C, H, W] uint8 from the stream, float after preprocessing
    support_labels: Tensor  # [T, S] int64
    query: Tensor  # [T, Q, C, H, W]
    query_labels: Tensor  # [T, Q] int64
    classes: Tensor  # [T, way] int64: the dataset's class id of every label
    way: int
    auxiliary: Images | None = None  # for methods that are trained on both

    @property
    def tasks(self) -> int:
        return self.support.shape[0]


Batch = Episodes | Images
