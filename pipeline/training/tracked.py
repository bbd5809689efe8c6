"""The training of a run, with its figures on their way to MLflow; what follows it is ``pipeline.workflow``."""

from __future__ import annotations

from pipeline.config import Config
from pipeline.registry.tracker import Tracker
from pipeline.registry.tracking_config import check_tracking
from pipeline.training.config import TrainConfig
from pipeline.training.launch import launch, prepare
from pipeline.training.progress import Entry
from pipeline.training.runs import Run


def train_only(raw: Config) -> tuple[TrainConfig, Run]:
    """Train a run, or go on with one, to its end."""
    config, _, run = prepare(raw)
    check_tracking(config.tracking)
    print(f"run {run.name}: {config.method['name']} on {run.dataset['name']}, {config.steps:,} steps", flush=True)
    tracker = Tracker(run.name, config.tracking, run.config, run.dataset)
    status: str | None = "FAILED"
    try:
        launch(config, run, lambda entry: tracker.log(int(entry["step"]), _figures(entry)))
        status = None  # publishing ends it
    finally:
        delivery = tracker.close(status=status)
    if delivery.message:
        print(delivery.message, flush=True)
    return config, run


def _figures(entry: Entry) -> Entry:
    return {key: value for key, value in entry.items() if key != "step"}
