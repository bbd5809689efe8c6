"""A run's figures as Ray metrics, which every node exports to Prometheus as ``ray_pipeline_...``.

The driver sets them, once for each entry that the workers log: nothing is added to a training step, and a series goes
on when a worker is replaced. What goes wrong here is logged once and never reaches the training.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.train import UserCallback

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


class Telemetry:
    """The metrics of one run. Calling it with a logged entry sets them; without Ray it does nothing.

    Ray forgets what has not been set for half a minute. Within a ``with`` all are set again and again, so that what a
    run says seldom, or once, stays to be seen until it ends.

    Args:
        run, method, dataset: tags of every metric.
        steps: how many the run is to do.
    """

    def __init__(self, run: str, method: str, dataset: str, steps: int) -> None:
        self.tags = dict(zip(TAGS, (run, method, dataset), strict=True))
        self._latest: Entry = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="telemetry", daemon=True)
        self({STEPS: steps, RESTARTS: 0})

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
