"""A run's folder brought to MLflow: what is there already stays, what is missing is added."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlflow.entities import Metric

from pipeline import store as folders
from pipeline.errors import PipelineError
from pipeline.registry.masking import mask
from pipeline.registry.record import ALIVE, Point, delivered_points, log_metrics, open_run
from pipeline.registry.tracker import BEAT
from pipeline.registry.tracking import Store, connect, reaching
from pipeline.registry.tracking_config import registering
from pipeline.training.checkpoint import STATE
from pipeline.training.runs import EVALUATION, REPORT, Run, best_checkpoint, checkpoints, read_run

BEST, PLOTS = "checkpoints/best", "plots"
_CHECKPOINT_TAG = "pipeline.checkpoint"


@dataclass(frozen=True)
class Published:
    """Where a run is in MLflow, and what this call added."""

    run_id: str
    run_name: str
    uri: str  # of the store
    checkpoint: str  # URI of the best checkpoint
    metrics_added: int


def publish(run_uri: str, tracking: Mapping[str, Any], ended: bool = True) -> Published:
    """Publish a run's folder, local or ``s3://``, as one MLflow run.

    The MLflow run has the configuration (as parameters and as ``config.yaml``), the environment, the dataset's
    fingerprint, the figures over time of the latest checkpoint, the best checkpoint, the learning curve, and every
    file of the folder's ``report/`` (the figures in ``report/evaluation.json`` as metrics too). Called again, it adds
    what is missing.

    Args:
        ended: whether the training is known to have ended; else a run that gives signs of life goes on as running.

    Raises:
        PipelineError: the folder is no run, or the store is away.
    """
    run = read_run(run_uri)
    with reaching(tracking, f"publish the run later with: {registering(run.uri, tracking)}"):
        store = connect(tracking)
        run_id = open_run(store, run.name, run.config, run.dataset)
        best = best_checkpoint(run.uri)
        state = _state(best)
        history = _state(checkpoints(run.uri)[-1])["history"]
        known, now = delivered_points(store, run_id), int(time.time() * 1000)
        found = _metrics(history, evaluation_of(run), state["step"])
        new = [Metric(name, value, now, step) for (name, step), value in found.items() if (name, step) not in known]
        added = log_metrics(store, run_id, new)
        _put_checkpoint(store, run_id, best, state)
        _put_files(store, run_id, run, history)
        _finish(store, run_id, ended)
    return Published(run_id, run.name, store.uri, best, added)


def evaluation_of(run: Run) -> list[dict[str, Any]]:
    """Results in the run's ``report/evaluation.json``: split, way, shot, query, episodes, seed, accuracy, interval."""
    where = folders.join(run.uri, REPORT, EVALUATION)
    if not folders.exists(where):
        return []
    try:
        results = json.loads(folders.read_bytes(where))
        for result in results:
            int(result["way"]), int(result["shot"]), float(result["accuracy"]), float(result["interval"])
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{where} holds no results ({type(error).__name__}: {error}); evaluate again") from error
    return results


def result_name(result: Mapping[str, Any]) -> str:
    """``5way_1shot``"""
    return f"{result['way']}way_{result['shot']}shot"


def _state(checkpoint_uri: str) -> dict[str, Any]:
    return json.loads(folders.read_bytes(folders.join(checkpoint_uri, STATE)))


def _metrics(history: list[dict[str, float]], results: list[dict[str, Any]], step: int) -> dict[Point, float]:
    """Figures over time, and those of the evaluation, which are of one step."""
    found = {
        (name, int(entry["step"])): float(value)
        for entry in history
        for name, value in entry.items()
        if name != "step"
    }
    for result in results:
        for figure in ("accuracy", "interval"):
            found[f"{result['split']}/{figure}_{result_name(result)}", step] = float(result[figure])
    return found


def _put_checkpoint(store: Store, run_id: str, uri: str, state: dict[str, Any]) -> None:
    """Upload the checkpoint unless its tag says that it is there whole."""
    identity = f"{state['step']}:{state['sha256']['model.safetensors']}"
    if store.client.get_run(run_id).data.tags.get(_CHECKPOINT_TAG) == identity:
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in folders.list_names(uri):
            if name == STATE:  # masked, it no longer has its digest
                shown = mask({key: value for key, value in state.items() if key != "digest"})
                content = json.dumps(shown, indent=1).encode()
            elif name in state["sha256"]:
                content = folders.read_bytes(folders.join(uri, name))
            else:
                continue
            (Path(folder) / name).write_bytes(content)
        store.client.log_artifacts(run_id, folder, BEST)
    store.client.set_tag(run_id, _CHECKPOINT_TAG, identity)


def _put_files(store: Store, run_id: str, run: Run, history: list[dict[str, float]]) -> None:
    """The learning curve and the files of ``report/``; written again they replace their older selves."""
    from pipeline.charts.accuracy import learning_curve  # matplotlib, which no training waits for before its first step

    accuracy = [(e["step"], e["val/accuracy"], e.get("val/interval", 0.0)) for e in history if "val/accuracy" in e]
    loss = [(e["step"], e["train/loss"]) for e in history if "train/loss" in e]
    kinds: tuple[Literal["svg", "png"], ...] = ("svg", "png")
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            (Path(folder) / f"learning_curve.{kind}").write_bytes(learning_curve(accuracy, loss, run.name, kind))
        store.client.log_artifacts(run_id, folder, PLOTS)
    with tempfile.TemporaryDirectory() as folder:
        where = folders.join(run.uri, REPORT)
        for name in folders.list_names(where):
            (Path(folder) / name).write_bytes(folders.read_bytes(folders.join(where, name)))
        if os.listdir(folder):
            store.client.log_artifacts(run_id, folder, REPORT)


def _finish(store: Store, run_id: str, ended: bool) -> None:
    run = store.client.get_run(run_id)
    alive = run.data.tags.get(ALIVE, "")
    trains = run.info.status == "RUNNING" and alive.isdecimal() and time.time() - int(alive) < 2 * BEAT
    if run.info.status != "FINISHED" and (ended or not trains):
        store.client.set_terminated(run_id, status="FINISHED")
