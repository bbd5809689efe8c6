"""One trial: the function that Ray Tune runs. It launches a run under Ray Train and passes its validations on."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.train import UserCallback
from ray.util.queue import Queue

from pipeline.config import validate
from pipeline.errors import PipelineError
from pipeline.search.release import Holder
from pipeline.training.config import TrainConfig
from pipeline.training.launch import launch
from pipeline.training.runs import Run

ACCURACY, STEP, FAILED, FINISHED = "val/accuracy", "step", "failed", "finished"


class Forward(UserCallback):
    """Puts what was reported at a checkpoint into a queue; checkpoints that were not validated carry an accuracy of -1.

    Ray's own ``TuneReportCallback`` hangs for good where a trial's function ends just before its last report is
    fetched: whoever fetches it waits for room that only the same thread can make.
    """

    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if metrics[0].get(ACCURACY, -1.0) >= 0:
            self.queue.put({STEP: metrics[0][STEP], ACCURACY: metrics[0][ACCURACY]})


@contextmanager
def reporting() -> Iterator[Forward]:
    """A callback whose reports reach Ray Tune from this process, in their order, all of them before this ends."""
    queue = Queue(maxsize=1, actor_options={"num_cpus": 0})

    def pass_on() -> None:
        while (entry := queue.get()) is not None:
            tune.report(entry)

    thread = threading.Thread(target=pass_on, name="reports", daemon=True)
    thread.start()
    try:
        yield Forward(queue)
    finally:
        queue.put(None)
        thread.join()
        queue.shutdown()


def run_trial(trial: dict[str, Any]) -> None:
    """``trial["run"]`` is a :class:`Run` as JSON. Called again for a run that was interrupted, it goes on with it.

    What goes wrong is reported as "failed", with its reason: it concerns this trial alone.
    """
    run = Run(**json.loads(trial["run"]))
    try:
        with reporting() as forward:
            launch(validate(TrainConfig, run.config), run, callbacks=[forward, Holder(forward.queue)])
    except PipelineError as error:
        tune.report({FAILED: str(error).removeprefix(f"run {run.name}: ")})
    except Exception as error:  # a bug, or a worker that died too often: its traceback is in the trial's log
        logging.getLogger(__name__).exception("trial %s", run.name)
        tune.report({FAILED: f"{type(error).__name__}: {last_line(error)}"})
    else:
        tune.report({FINISHED: True})


def last_line(error: BaseException) -> str:
    """Of a message with tracebacks, the line that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else "no message")[:300]
