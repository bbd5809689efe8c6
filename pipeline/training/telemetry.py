"""What a run says while it trains: an actor that the workers tell, the display of the driver, and Ray metrics.

The driver sets the metrics, once for each entry that the workers log, and every node exports them to Prometheus as
``ray_pipeline_...``: nothing is added to a training step, and a series goes on when a worker is replaced. What goes
wrong with them is logged once and never reaches the training.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.train import UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

POLL_SECONDS = 0.5
LINE_SECONDS = 10.0  # between plain lines, where the output is no terminal
WAIT_SECONDS = 30.0  # without workers after which a run says what it waits for; twice as long each time
PREPARE_SECONDS = 120.0  # without a step, once its workers are there: they fetch shards, and may compile
Entry = dict[str, float]

TAGS = ("run", "method", "dataset")
CHECKPOINT_SECONDS, RESTARTS, STEPS = "checkpoint/seconds", "restarts", "steps"
GAUGES: dict[str, tuple[str, str]] = {  # key of a logged entry -> name and meaning of its metric
    "step": ("pipeline_step", "Optimizer steps done"),
    "train/episodes_per_s": ("pipeline_episodes_per_second", "Episodes (or images) a second, over all workers"),
    "train/step_s": ("pipeline_step_seconds", "Seconds of a training step, mean since the last log line"),
    "train/wait_share": ("pipeline_data_wait_share", "Share of the time that the first worker waited for data, 0 to 1"),
    "train/loss": ("pipeline_loss", "Training loss, mean since the last log line"),
    "val/accuracy": ("pipeline_validation_accuracy", "Accuracy on the fixed validation episodes, 0 to 1"),
    "val/interval": ("pipeline_validation_interval", "Half of the 95 % interval of the validation accuracy"),
    CHECKPOINT_SECONDS: ("pipeline_checkpoint_seconds", "Seconds that training stood still for the last checkpoint"),
    RESTARTS: ("pipeline_restarts", "How often workers were lost since the driver began"),
    STEPS: ("pipeline_steps", "Optimizer steps that the run is to do"),
}

AGAIN_S = 10.0

_log = logging.getLogger(__name__)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class Monitor:
    """Holds what the workers said until the driver has read it."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._step = 0
        self._stopped = ""
        self._leave = self._begun = False
        self._said: list[str] = []

    def begin(self) -> None:
        """The workers are there."""
        self._begun = True

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

    def stop(self, reason: str) -> None:
        self._stopped = reason

    def ended(self) -> tuple[str, bool]:
        """Why training ended before its time, if it did, and whether it was asked to."""
        return self._stopped, self._leave

    def read(self, after: int, said: int = 0) -> tuple[bool, int, list[Entry], list[str]]:
        """Whether the workers are there, the latest step, entries from number ``after`` on, lines from ``said`` on."""
        return self._begun, self._step, self._entries[after:], self._said[said:]


def start_monitor() -> Any:
    """A monitor on this process' node: what it holds is lost with its node, and without this one there is no run."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return Monitor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


class Display:
    """A bar on a terminal, plain lines elsewhere, drawn by a thread from what the monitor holds.

    ``on_log`` gets every logged entry once. ``needs``: the resources of all workers, to say what a run waits for that
    does not begin.
    """

    def __init__(
        self,
        monitor: Any,
        steps: int,
        label: str,
        on_log: Callable[[Entry], None] | None = None,
        needs: Mapping[str, float] | None = None,
    ) -> None:
        self._monitor, self._steps, self._label, self._on_log = monitor, steps, label, on_log
        self._needs = dict(needs or {})
        self._patience, self._entered = WAIT_SECONDS, time.monotonic()
        self._ready: float | None = None  # when the workers were seen to be there
        self._console = Console(file=sys.stdout)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._figures: Entry = {}
        self._new: Entry = {}  # since the last plain line
        self._seen = self._shown = 0
        self._step = 0
        self.begun = False  # whether the workers are there
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
                    print(f"{self._label}  {self.line(self._new)}", flush=True)
                    self._new = {}

            self._poll(plain)

    def _poll(self, draw: Callable[[], None]) -> None:
        while True:
            stopping = self._stop.wait(POLL_SECONDS)
            self._read()
            if self._began is None and not stopping:
                self._say_waiting()
            draw()
            if stopping:
                return

    def _read(self) -> None:
        try:
            self.begun, step, entries, lines = ray.get(self._monitor.read.remote(self._seen, self._shown), timeout=5)
        except (ray.exceptions.RayError, TimeoutError):
            return  # the next reading tells
        self._seen += len(entries)
        self._shown += len(lines)
        for line in lines:
            self._say(line)
        for entry in entries:
            self._figures.update(entry)
            self._new.update(entry)
            if self._on_log:
                self._on_log(entry)
        self._step = max(step, int(self._figures.get("step", 0)))
        if self._step and self._began is None:
            self._began = (time.monotonic(), self._step)

    def _say(self, line: str) -> None:
        self._console.print(f"{self._label}  {line}", markup=False, highlight=False, soft_wrap=True)

    def _say_waiting(self) -> None:
        now = time.monotonic()
        if self.begun and self._ready is None:
            self._ready, self._patience = now, PREPARE_SECONDS
            if not self._steps:
                self._say("no steps are asked for: its workers validate the network as it begins, and save it")
        if now - (self._ready or self._entered) < self._patience or (self.begun and not self._steps):
            return
        waited, self._patience = self._patience, 2 * self._patience
        with contextlib.suppress(ray.exceptions.RayError):
            free, whole = ray.available_resources(), ray.cluster_resources()
            if self.begun:
                left = f"{free.get('CPU', 0.0):g} of {whole.get('CPU', 0.0):g} CPUs are free"
                self._say(f"no step {waited:g} s after its workers came: they prepare, or wait for Ray Data ({left})")
                return
            wanted = [
                f"{need:g} {kind}s ({free.get(kind, 0.0):g} of {whole.get(kind, 0.0):g} are free)"
                for kind, need in self._needs.items()
            ]
            self._say(f"no step after {waited:g} s: it waits for its workers, which need {' and '.join(wanted)}")

    def line(self, figures: Entry | None = None) -> str:
        """step 500/2000  left 6:05  4.1 steps/s  16 episodes/s  loss 0.412  acc 86 %  val 87.1 ± 0.9 %  wait 0.4 %

        ``figures``: those that are shown; None: the latest of each.
        """
        figures = self._figures if figures is None else figures
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


class Telemetry:
    """The metrics of one run. Calling it with a logged entry sets them; without Ray it does nothing.

    Ray forgets what has not been set for half a minute. Within a ``with`` all are set again and again, so that what a
    run says seldom, or once, stays to be seen until it ends.

    Args:
        run, method, dataset: tags of every metric.
        steps: how many the run is to do.
        step: how many it has done, from which a run that never does another is seen to stand still.
    """

    def __init__(self, run: str, method: str, dataset: str, steps: int, step: int = 0) -> None:
        self.tags = dict(zip(TAGS, (run, method, dataset), strict=True))
        self._latest: Entry = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="telemetry", daemon=True)
        self({"step": step, STEPS: steps, RESTARTS: 0})

    def __call__(self, entry: Entry) -> None:
        figures = dict(entry)
        if figures.get("train/steps_per_s"):
            figures["train/step_s"] = 1 / figures["train/steps_per_s"]
        known = {key: value for key, value in figures.items() if key in GAUGES}
        self._latest = {**self._latest, **known}
        self._set(known)

    def __enter__(self) -> Telemetry:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._set(self._latest)  # for the last time

    def _repeat(self) -> None:
        while not self._over.wait(AGAIN_S):
            self._set(self._latest)

    def _set(self, figures: Entry) -> None:
        if not ray.is_initialized():
            return
        try:
            for key, value in figures.items():
                _gauge(*GAUGES[key]).set(float(value), self.tags)
        except Exception as error:  # metrics are never worth a training
            _complain(f"{type(error).__name__}: {error}")

    def beside(self, on_log: Callable[[Entry], None] | None) -> Callable[[Entry], None]:
        """A function that passes an entry on to ``on_log`` and sets the metrics."""

        def both(entry: Entry) -> None:
            self(entry)
            if on_log is not None:
                on_log(entry)

        return both


class Restarts(UserCallback):
    """Counts, in Ray Train's controller, how often workers were lost, and tells the monitor."""

    def __init__(self, monitor: Any) -> None:
        self.monitor, self.count, self.step = monitor, 0, 0

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self.step = int(metrics[0].get("step", self.step))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self.count += 1
        self.monitor.log.remote({"step": self.step, RESTARTS: self.count})


@functools.cache
def _gauge(name: str, meaning: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, description=meaning, tag_keys=TAGS)


@functools.cache
def _complain(reason: str) -> None:
    _log.warning("metrics are not exported: %s", reason)
