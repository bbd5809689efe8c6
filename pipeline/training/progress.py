"""How far a run is: an actor that the first worker tells, and the driver that shows it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

POLL_SECONDS = 0.5
LINE_SECONDS = 10.0  # between plain lines, where the output is no terminal

Entry = dict[str, float]


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class Monitor:
    """Holds what the workers said until the driver has read it."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._step = 0
        self._stopped = ""
        self._leave = False
        self._said: list[str] = []

    def say(self, line: str) -> None:
        """A line for whoever watches."""
        self._said.append(line)

    def log(self, entry: Entry) -> None:
        self._entries.append(entry)

    def tick(self, step: int) -> bool:
        """Note the step; whether the workers shall save and leave."""
        self._step = step
        return self._leave

    def leave(self) -> None:
        """Ask the workers to save a checkpoint after their step, and to end."""
        self._leave = True

    def asked_to_leave(self) -> bool:
        return self._leave

    def stop(self, reason: str) -> None:
        self._stopped = reason

    def stopped(self) -> str:
        """Why training ended before its time, if it did."""
        return self._stopped

    def read(self, after: int, said: int = 0) -> tuple[int, list[Entry], list[str]]:
        """The latest step, the entries from number ``after`` on, and the lines from number ``said`` on."""
        return self._step, self._entries[after:], self._said[said:]


def start_monitor() -> Any:
    """A monitor on this process' node: what it holds is lost with its node, and without this one there is no run."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return Monitor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


@contextmanager
def leaving_on_sigterm(monitor: Any) -> Iterator[None]:
    """In here the first SIGTERM asks the workers to save and to end; the second one does what it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, before)
        monitor.leave.remote()

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def asked_to_leave(monitor: Any) -> bool:
    return bool(ray.get(monitor.asked_to_leave.remote()))


class Display:
    """A bar on a terminal, plain lines elsewhere, drawn by a thread from what the monitor holds.

    ``on_log`` gets every logged entry once.
    """

    def __init__(self, monitor: Any, steps: int, label: str, on_log: Callable[[Entry], None] | None = None) -> None:
        self._monitor, self._steps, self._label, self._on_log = monitor, steps, label, on_log
        self._console = Console(file=sys.stdout)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._figures: Entry = {}
        self._seen = self._shown = 0
        self._step = 0
        self._began: tuple[float, int] | None = None  # time and step of the first sign of life

    def __enter__(self) -> Display:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        if self._console.is_terminal:
            columns = (BarColumn(bar_width=10), TextColumn("{task.fields[line]}"))  # the run's name stands above
            with Progress(*columns, console=self._console) as bar:
                task = bar.add_task(self._label, total=self._steps, line="starting")
                self._poll(lambda: bar.update(task, completed=self._step, line=self.line()))
        else:
            last = [time.monotonic(), -1]

            def plain() -> None:
                now = time.monotonic()
                if self._step != last[1] and (now - last[0] >= LINE_SECONDS or self._step >= self._steps):
                    last[:] = [now, self._step]
                    print(f"{self._label}  {self.line()}", flush=True)

            self._poll(plain)

    def _poll(self, draw: Callable[[], None]) -> None:
        while True:
            stopping = self._stop.wait(POLL_SECONDS)
            self._read()
            draw()
            if stopping:
                return

    def _read(self) -> None:
        try:
            step, entries, lines = ray.get(self._monitor.read.remote(self._seen, self._shown), timeout=5)
        except (ray.exceptions.RayError, TimeoutError):
            return  # the next reading tells
        self._seen += len(entries)
        self._shown += len(lines)
        for line in lines:
            self._console.print(f"{self._label}  {line}", markup=False, highlight=False, soft_wrap=True)
        for entry in entries:
            self._figures.update(entry)
            if self._on_log:
                self._on_log(entry)
        self._step = max(step, int(self._figures.get("step", 0)))
        if self._step and self._began is None:
            self._began = (time.monotonic(), self._step)

    def line(self) -> str:
        """step 500/2000  left 6:05  4.1 steps/s  16 episodes/s  loss 0.412  acc 86 %  val 87.1 ± 0.9 %  wait 0.4 %"""
        figures = self._figures
        parts = [f"step {self._step:,}/{self._steps:,}"]
        left = self._left()
        if left is not None:
            parts.append(f"left {int(left) // 60}:{int(left) % 60:02d}")
        if "train/steps_per_s" in figures:
            parts.append(f"{figures['train/steps_per_s']:.3g} steps/s")
            parts.append(f"{figures['train/episodes_per_s']:.3g} episodes/s")
            parts.append(f"loss {figures['train/loss']:.4g}")
        if "train/accuracy" in figures:
            parts.append(f"acc {100 * figures['train/accuracy']:.1f} %")
        if "val/accuracy" in figures:
            parts.append(f"val {100 * figures['val/accuracy']:.1f} ± {100 * figures['val/interval']:.1f} %")
        if "train/wait_share" in figures:
            parts.append(f"wait {100 * figures['train/wait_share']:.1f} %")
        return "  ".join(parts)

    def _left(self) -> float | None:
        if self._began is None or self._step <= self._began[1]:
            return None
        return (time.monotonic() - self._began[0]) / (self._step - self._began[1]) * (self._steps - self._step)
