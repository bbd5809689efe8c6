"""Figures of a training that runs, delivered to MLflow beside it: training never waits for the store.

Nor for MLflow, which takes seconds of CPU to import and to make its tables' classes: the thread that delivers does so,
once there is something to deliver. Until then the processes that start have the CPU.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import PipelineError
from pipeline.registry.masking import first_line
from pipeline.registry.tracking_config import registering

if TYPE_CHECKING:
    from pipeline.registry.record import Point
    from pipeline.registry.tracking import Store

PATIENCE = 30.0  # seconds after which the run is made though nothing is logged: a cluster may take minutes to grow
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds between attempts, doubled after each failure
CAPACITY = 100_000  # metrics kept while the store is away; the oldest go first, and are counted
_AT_ONCE = 1000
BEAT = 60.0  # seconds between two signs of life
LOST = 20 * BEAT  # without one for so long a run that is said to run does so no more


class Figure(NamedTuple):
    """What MLflow calls a metric."""

    key: str
    value: float
    timestamp: int  # ms
    step: int


@dataclass(frozen=True)
class Delivery:
    """What became of what was logged."""

    delivered: int
    lost: int  # metrics that did not arrive
    reason: str  # of the last failure; empty where nothing is lost
    message: str  # one line that names what is lost and the command that delivers it; empty where nothing is lost


class Tracker:
    """Live metrics of a run.

    A thread of its own finds or makes the MLflow run and delivers what :meth:`log` was given, again and again with
    growing pauses while the store is away. A metric of a step that the run has already (a training that was resumed or
    whose worker died computes steps again) is not logged twice.

    With ``uri: null`` in ``tracking`` nothing is tracked; of ``config`` and ``dataset`` are parameters and tags.
    """

    def __init__(
        self, run_name: str, tracking: Mapping[str, Any], config: Mapping[str, Any], dataset: Mapping[str, Any]
    ) -> None:
        self.run_name = run_name
        self._folder = f"{str(config['storage']).rstrip('/')}/{run_name}" if "storage" in config else run_name
        self._tracking, self._config, self._dataset = dict(tracking), dict(config), dict(dataset)
        self._pending: deque[Figure] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._ended = threading.Event()  # nobody waits for the deliveries any more
        self._status: str | None = None
        self._delivered = self._dropped = 0
        self._reason = self._refused = ""
        self._store: Store | None = None
        self._run_id: str | None = None
        self._known: set[Point] = set()
        self._thread: threading.Thread | None = None
        if self._tracking.get("uri") is not None:
            self._thread = threading.Thread(target=self._deliver_all, name="tracker", daemon=True)
            self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note figures of a step. Returns at once and never raises."""
        if self._thread is None:
            return
        now = int(time.time() * 1000)
        with self._changed:
            for name, value in metrics.items():
                try:
                    self._pending.append(Figure(str(name), float(value), now, int(step)))
                except (TypeError, ValueError):
                    self._dropped += 1
                    self._refused = f"{name} is not a number"
            while len(self._pending) > CAPACITY:
                self._pending.popleft()
                self._dropped += 1
                self._refused = f"more than {CAPACITY:,} waited"
            self._changed.notify()

    def close(self, timeout: float | None = None, status: str | None = None) -> Delivery:
        """Wait for the deliveries at most ``timeout`` seconds (by default ``tracking.timeout``), then stop.

        Args:
            status: "FAILED" or "KILLED" ends the MLflow run with it. A run that was finished is ended by ``publish``.
        """
        if self._thread is None:
            return Delivery(0, 0, "", "")
        with self._changed:
            self._closing, self._status = True, status
            self._changed.notify()
        self._thread.join(float(self._tracking.get("timeout", 30)) if timeout is None else timeout)
        self._ended.set()
        with self._changed:
            lost = len(self._pending) + self._dropped
            self._pending.clear()
        if not lost and not self._reason:
            return Delivery(self._delivered, 0, "", "")
        reason = self._reason or self._refused or "the store did not answer in time"
        message = (
            f"{lost} of {lost + self._delivered} tracked figures did not reach MLflow ({reason}); "
            f"deliver them with: {registering(self._folder, self._tracking)}"
        )
        return Delivery(self._delivered, lost, reason, message)

    def _deliver_all(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._pending) or self._closing, timeout=PATIENCE)
        wait = FIRST_WAIT
        while True:
            try:
                if self._deliver():
                    return
                wait = FIRST_WAIT
            except PipelineError as error:  # a configuration that no repetition makes right
                self._reason = str(error)
                return
            except Exception as error:  # whatever it is, training goes on: it is tried again, and named at the end
                self._reason = first_line(error)
                with self._changed:
                    closing = self._closing or self._changed.wait_for(lambda: self._closing, timeout=wait)
                if closing and self._ended.wait(min(wait, 1.0)):  # outside the lock, which close() takes
                    return
                wait = min(2 * wait, LONGEST_WAIT)

    def _deliver(self) -> bool:
        """Deliver what is pending, or wait for more; true when all is done."""
        from mlflow.entities import Metric

        from pipeline.registry.record import delivered_points, end_lost, log_metrics, open_run, sign_of_life
        from pipeline.registry.tracking import connect

        if self._store is None:
            self._store = connect(self._tracking)
        if self._run_id is None:
            self._run_id = open_run(self._store, self.run_name, self._config, self._dataset)
            self._store.client.update_run(self._run_id, status="RUNNING")  # one that goes on had ended
            sign_of_life(self._store, self._run_id)
            end_lost(self._store, LOST)
            self._known = delivered_points(self._store, self._run_id)
        if self._reason:  # while the store was away somebody may have taken this run for a lost one
            self._store.client.update_run(self._run_id, status="RUNNING")
            self._reason = ""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._pending) or self._closing, timeout=BEAT)
            part = [self._pending[i] for i in range(min(len(self._pending), _AT_ONCE))]
            closing = self._closing
        if not part and not closing:
            sign_of_life(self._store, self._run_id)
            return False
        if not part:
            if self._status is not None:
                self._store.client.set_terminated(self._run_id, status=self._status)
            return True
        new: dict[Point, Figure] = {}
        for metric in part:
            if (metric.key, metric.step) not in self._known:
                new.setdefault((metric.key, metric.step), metric)
        log_metrics(self._store, self._run_id, [Metric(*figure) for figure in new.values()])
        sign_of_life(self._store, self._run_id)
        self._known |= new.keys()
        with self._changed:
            for metric in part:
                if self._pending and self._pending[0] is metric:  # unless it was dropped meanwhile, for want of room
                    self._pending.popleft()
            self._delivered += len(part)
        self._reason = ""
        return False
