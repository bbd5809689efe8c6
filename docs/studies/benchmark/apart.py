"""Sides that are measured in a process of their own: with their own threads, without Ray."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from pipeline.training.allocator import ALLOCATOR

Side = Callable[..., Iterator[Any]]  # sets up, then measures whenever the next figure is asked for


class Apart:
    """A generator that runs in a fresh process; called, it gives its next figure.

    ``product``: the process is started as those of Ray are (:mod:`pipeline.training.allocator`), not as a plain one;
    ``allocator``: with these of the allocator's variables instead.
    """

    def __init__(
        self,
        side: Side,
        *arguments: Any,
        threads: int = 1,
        product: bool = False,
        allocator: Mapping[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        # Not a daemon: a data loader's workers are its children.
        self._process = context.Process(target=_serve, args=(other, threads, side, arguments))
        with _environment(allocator or (ALLOCATOR if product else {})):
            self._process.start()
        other.close()

    def ask(self) -> None:
        self._pipe.send(True)

    def answer(self) -> Any:
        try:
            worked, found = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a measured process ended with code {self._process.exitcode}") from None
        if not worked:
            raise RuntimeError(f"in a measured process:\n{found}")
        return found

    def __call__(self) -> Any:
        self.ask()
        return self.answer()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # it ends when nobody can ask any more
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


class Together:
    """Several processes that measure at the same time; the slowest counts."""

    def __init__(self, parts: Sequence[Apart]) -> None:
        self.parts = parts

    def __call__(self) -> float:
        for part in self.parts:
            part.ask()
        return max(float(part.answer()) for part in self.parts)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Within, of the allocator's variables these are set and no others."""
    before = {key: os.environ.pop(key) for key in ALLOCATOR if key in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key in variables:
            del os.environ[key]
        os.environ.update(before)


def _serve(pipe: Connection, threads: int, side: Side, arguments: tuple[Any, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    figures = side(*arguments)
    while True:
        try:
            pipe.recv()
        except EOFError:
            figures.close()  # type: ignore[attr-defined]
            return
        try:
            pipe.send((True, next(figures)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
