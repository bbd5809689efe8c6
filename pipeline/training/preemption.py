"""Preemption: a machine that will be taken away, or a job that is to end, heard by one worker and agreed by all.

Three ways lead here. A node that Ray drains (a spot notice that is passed on by ``ray drain-node``), SIGTERM to a
training worker, and SIGTERM to the job, which the driver tells the first worker by its monitor. The workers must leave
their steps together: each sends the signal that it has heard to all others, by a reduction that travels beside the next
step, so that nobody waits for it.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import ray
import torch
import torch.distributed as dist

from pipeline.errors import Stopped
from pipeline.ray_internals import node_is_draining

_TERMINATED = threading.Event()  # of this process


class Signal(IntEnum):
    """What the workers are asked, from outside, to do after a step; the larger is the more urgent."""

    NONE = 0
    SAVE = 1  # a machine will go: write a checkpoint, once
    LEAVE = 2  # the job is to end: write a checkpoint and stop


class Preemption:
    """The signal that this worker has heard, and the one that all have agreed on."""

    def __init__(self, world_size: int) -> None:
        self._heard, self._obeyed = Signal.NONE, Signal.NONE
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._flag, self._travelling = torch.zeros((), dtype=torch.int32), None
        _on_sigterm()

    def hear(self, signal: Signal) -> None:
        self._heard = max(self._heard, signal)

    @property
    def left(self) -> bool:
        """Whether the workers have ended because they were asked to."""
        return self._obeyed is Signal.LEAVE

    def __call__(self) -> Signal:
        """After every step, on all workers: the same answer on each; a signal is given once."""
        if _TERMINATED.is_set() or node_is_draining():
            self.hear(Signal.SAVE)
        agreed = self._agree() if self._group is not None else self._heard
        if agreed <= self._obeyed:
            return Signal.NONE
        self._obeyed = agreed
        return agreed

    def _agree(self) -> Signal:
        """The most urgent signal that any worker had heard a step ago."""
        found = Signal.NONE
        if self._travelling is not None:
            self._travelling.wait()
            found = Signal(int(self._flag))
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


class _Asked(KeyboardInterrupt):
    """SIGTERM was met. Ray, where it waits, lets this one kind of exception through, and exits at any other."""


@contextmanager
def stopping_on_sigterm(message: str, leave: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """In here the first SIGTERM raises Stopped with ``message``; the second one does what it did before.

    ``leave``: asks those who have something to save to end by themselves, and says whether it could; where they have
    not begun, they may wait for a place without end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, raised = signal.getsignal(signal.SIGTERM), threading.Event()

    def handle(*_: object) -> None:
        signal.signal(signal.SIGTERM, before)
        if not leave():
            raised.set()
            raise _Asked

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    except KeyboardInterrupt as error:  # Ray raises one of its own for it
        if raised.is_set():
            raise Stopped(message) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
