"""Being told to go: a machine that will be taken away, or a job that shall end, heard by one worker and agreed by all.

Three ways lead here. A node that Ray drains (a spot notice that is passed on by ``ray drain-node``), SIGTERM to a
training worker, and SIGTERM to the job, which the driver tells the first worker by its monitor. The workers must leave
their steps together: each tells what it has heard in a sum over all workers that travels beside the next step, so that
nobody waits for it.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import ray
import torch
import torch.distributed as dist

from pipeline.ray_internals import node_is_draining
from pipeline.training.loop import Notice

_TERMINATED = threading.Event()  # of this process


class Notices:
    """What this worker has heard, and what all have agreed on."""

    def __init__(self, world_size: int) -> None:
        self._heard, self._obeyed = Notice.NONE, Notice.NONE
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._flag, self._travelling = torch.zeros((), dtype=torch.int32), None
        _on_sigterm()

    def hear(self, notice: Notice) -> None:
        self._heard = max(self._heard, notice)

    @property
    def left(self) -> bool:
        """Whether the workers have ended because they were asked to."""
        return self._obeyed is Notice.LEAVE

    def __call__(self) -> Notice:
        """After every step, on all workers: the same answer on each; a notice is given once."""
        if _TERMINATED.is_set() or node_is_draining():
            self.hear(Notice.SAVE)
        agreed = self._agree() if self._group is not None else self._heard
        if agreed <= self._obeyed:
            return Notice.NONE
        self._obeyed = agreed
        return agreed

    def _agree(self) -> Notice:
        """The most urgent notice that any worker had heard a step ago."""
        found = Notice.NONE
        if self._travelling is not None:
            self._travelling.wait()
            found = Notice(int(self._flag))
        self._flag = torch.tensor(int(self._heard), dtype=torch.int32)
        self._travelling = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return found


def _on_sigterm() -> None:
    """From the first SIGTERM on the process works on and ``_TERMINATED`` is set; at the second one it exits.

    A handler can be set by the main thread only; in a worker that is the one that serves the actor's calls. What it is
    sent is found by its name: this process is the one that receives it.
    """
    if threading.current_thread() is threading.main_thread():
        return  # a program of one's own, which has its own handlers
    try:
        actor = ray.get_runtime_context().current_actor
    except RuntimeError:  # not in an actor
        return
    actor.__ray_call__.remote(_set_handler)


def _set_handler(_: Any = None) -> None:
    signal.signal(signal.SIGTERM, _note)


def _note(*_: Any) -> None:
    if _TERMINATED.is_set():
        os._exit(128 + signal.SIGTERM)
    _TERMINATED.set()
