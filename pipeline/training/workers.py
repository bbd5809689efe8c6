"""What the workers of a run are to each other: means over all of them, and values put together."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Alone:
    """One worker."""

    rank: int = 0
    world_size: int = 1

    def mean(self, values: Tensor) -> Tensor:
        return values

    def gather(self, values: np.ndarray) -> np.ndarray:
        return values

    def take_firsts(self, tensors: Iterable[Tensor]) -> None:
        """Its own."""


class Distributed:
    """The workers of a process group."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world_size, self._device = dist.get_rank(), dist.get_world_size(), device

    def mean(self, values: Tensor) -> Tensor:
        total = values.detach().to(self._device)
        dist.all_reduce(total)
        return total / self.world_size

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Values that were dealt out in turn, put together in their order on every worker."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, values)
        whole = np.empty(sum(len(part) for part in parts), dtype=np.float64)
        for rank, part in enumerate(parts):
            whole[rank :: self.world_size] = part
        return whole

    def take_firsts(self, tensors: Iterable[Tensor]) -> None:
        """The first worker's values, in place."""
        for tensor in tensors:
            dist.broadcast(tensor, 0)


Workers = Alone | Distributed  # what a worker needs of the others
