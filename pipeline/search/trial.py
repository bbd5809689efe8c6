"""One trial: the function that Ray Tune runs. It launches a run under Ray Train and passes its validations on."""

from __future__ import annotations

import json
import logging
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from pipeline.config import validate
from pipeline.errors import PipelineError
from pipeline.search.release import Holder
from pipeline.training.config import TrainConfig
from pipeline.training.launch import launch
from pipeline.training.runs import Run

ACCURACY, STEP, FAILED, FINISHED = "val/accuracy", "step", "failed", "finished"


class Forward(TuneReportCallback):
    """Tells Ray Tune of checkpoints that were validated; the others carry an accuracy of -1."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if metrics[0].get(ACCURACY, -1.0) >= 0:
            super().after_report(run_context, metrics, None)


def run_trial(trial: dict[str, Any]) -> None:
    """``trial["run"]`` is a :class:`Run` as JSON. Called again for a run that was interrupted, it goes on with it.

    What goes wrong is reported as "failed", with its reason: it concerns this trial alone.
    """
    run = Run(**json.loads(trial["run"]))
    try:
        launch(validate(TrainConfig, run.config), run, callbacks=[Forward(), Holder()])
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
