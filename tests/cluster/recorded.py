"""Prototypical networks that note what they were given, and do to their own process what a test asks for.

A run names them by import path (``method.name=tests.cluster.recorded.Recorded``), so that the product needs no hook.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Episodes
from pipeline.methods.base import State
from pipeline.methods.prototypical import Prototypical


class Recorded(Prototypical):
    """Appends a line for every training batch to a file of its own process in ``notes``.

    Args:
        notes: folder of the test, seen by all nodes; nothing of the run is kept there.
        fault: what happens, where and when: ``forward``, ``all_reduce``, ``validation`` or ``memory``; ``all_reduce``
            holds one worker back so that the other waits for it, and says so in a file.
        at: the number, from 0, of the training batch (or of the validation batch) at which it happens.
        rank: the worker that it happens to.
        pause: seconds that every training batch takes longer, for tests that need time.
        poison: the digest of an episode whose loss is NaN, wherever it is met.
    """

    def __init__(
        self,
        backbone: nn.Module,
        notes: str = "",
        fault: str = "",
        at: int = 0,
        rank: int = 0,
        pause: float = 0.0,
        poison: str = "",
        **options: Any,
    ) -> None:
        super().__init__(backbone, **options)
        self.notes, self.fault, self.at, self.fault_rank, self.poison = notes, fault, at, rank, poison
        self.pause = pause
        self.trained = self.validated = 0

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(batch, Episodes)
        value, figures = self._noted(batch) if self.notes and self.training else super().loss(batch)
        if self.poison and self.poison in digests(batch):
            value = value * float("nan")
        return value, figures

    def _noted(self, batch: Episodes) -> tuple[Tensor, dict[str, Tensor]]:
        number, self.trained = self.trained, self.trained + 1
        self._note(batch)
        time.sleep(self.pause)
        if self.fault == "forward" and self._now(number):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "memory" and number == self.at:
            torch.empty(2**50)
        value, figures = super().loss(batch)
        if self.fault == "all_reduce" and self._now(number):
            value.register_hook(self._hold)  # runs at the start of the backward pass: the other one goes on without
        return value, figures

    def adapt(self, support: Tensor, labels: Tensor, way: int | None = None) -> State:
        if not self.training and self.notes:
            number, self.validated = self.validated, self.validated + 1
            if self.fault == "validation" and self._now(number):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().adapt(support, labels, way)

    def _now(self, number: int) -> bool:
        """Whether the fault is due, which it is once in all the run."""
        if number != self.at or _rank() != self.fault_rank:
            return False
        done = Path(self.notes) / "fault-done"
        if done.exists():
            return False
        done.touch()
        return True

    def _hold(self, gradient: Tensor) -> Tensor:
        (Path(self.notes) / "held").touch()
        time.sleep(60)  # it is the other one that dies; this one is ended by Ray
        return gradient

    def _note(self, batch: Episodes) -> None:
        line = {
            "group": f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
            "rank": _rank(),
            "workers": _world(),
            "time": time.time(),
            "episodes": digests(batch),
        }
        with open(Path(self.notes) / f"{os.uname().nodename}-{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def digests(batch: Episodes) -> list[str]:
    return [digest(batch.support[task], batch.query[task]) for task in range(batch.tasks)]


def digest(support: Tensor, query: Tensor) -> str:
    """What one episode is made of, preprocessed pixels [S, C, H, W] and [Q, C, H, W], as a short name."""
    content = support.contiguous().numpy().tobytes() + query.contiguous().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:20]


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _world() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
