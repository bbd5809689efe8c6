"""A run's folder brought to MLflow: what is there already stays, what is missing is added."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from mlflow.entities import Metric

from pipeline import store as folders
from pipeline.errors import PipelineError
from pipeline.registry.masking import mask
from pipeline.registry.record import ALIVE, Point, delivered_points, log_metrics, open_run, put_files
from pipeline.registry.tracker import BEAT
from pipeline.registry.tracking import Store, connect, reaching
from pipeline.registry.tracking_config import registering
from pipeline.training.checkpoint import STATE
from pipeline.training.runs import EVALUATION, REPORT, Run, best_checkpoint, checkpoints, read_run, step_of

BEST, PLOTS = "checkpoints/best", "plots"
_CHECKPOINT_TAG = "pipeline.checkpoint"


@dataclass(frozen=True)
class Published:
    """Where a run is in MLflow, and what this call added."""

    run_id: str
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
        told = store.client.get_run(run_id).data.metrics
        figures = _figures(evaluation_of(run))
        over_time = _over_time(history).items()
        new = [Metric(name, value, now, step) for (name, step), value in over_time if (name, step) not in known]
        new += [Metric(name, value, now, state["step"]) for name, value in figures.items() if told.get(name) != value]
        added = log_metrics(store, run_id, new)
        _put_checkpoint(store, run_id, best, state)
        _put_files(store, run_id, run, history)
        _finish(store, run_id, ended)
    return Published(run_id, store.uri, best, added)


def evaluation_of(run: Run) -> list[dict[str, Any]]:
    """Results in the run's ``report/evaluation.json``: split, way, shot, query, episodes, seed, accuracy, interval.

    Those of another checkpoint than the one that the run stands for now, since it went on, are left out.
    """
    where = folders.join(run.uri, REPORT, EVALUATION)
    if not folders.exists(where):
        return []
    try:
        results = json.loads(folders.read_bytes(where))
        for result in results:
            int(result["way"]), int(result["shot"]), float(result["accuracy"]), float(result["interval"])
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{where} holds no results ({type(error).__name__}: {error}); evaluate again") from error
    step = step_of(best_checkpoint(run.uri))
    return [result for result in results if result.get("step", step) == step]  # earlier code wrote none


def result_name(result: Mapping[str, Any]) -> str:
    """``5way_1shot``"""
    return f"{result['way']}way_{result['shot']}shot"


def _state(checkpoint_uri: str) -> dict[str, Any]:
    return json.loads(folders.read_bytes(folders.join(checkpoint_uri, STATE)))


def _over_time(history: list[dict[str, float]]) -> dict[Point, float]:
    return {
        (name, int(entry["step"])): float(value)
        for entry in history
        for name, value in entry.items()
        if name != "step"
    }


def _figures(results: list[dict[str, Any]]) -> dict[str, float]:
    """Those of the evaluation, which may be made again: the last ones count."""
    return {
        f"{result['split']}/{figure}_{result_name(result)}": float(result[figure])
        for result in results
        for figure in ("accuracy", "interval")
    }


def _put_checkpoint(store: Store, run_id: str, uri: str, state: dict[str, Any]) -> None:
    """Upload the checkpoint unless its tag says that it is there whole."""
    identity = f"{state['step']}:{state['sha256']['model.safetensors']}"
    if store.client.get_run(run_id).data.tags.get(_CHECKPOINT_TAG) == identity:
        return
    shown = mask({key: value for key, value in state.items() if key != "digest"})  # which it no longer has
    weights = (name for name in folders.list_names(uri) if name in state["sha256"])
    put_files(store, run_id, chain([(STATE, json.dumps(shown, indent=1).encode())], _contents(uri, weights)), BEST)
    store.client.set_tag(run_id, _CHECKPOINT_TAG, identity)


def _put_files(store: Store, run_id: str, run: Run, history: list[dict[str, float]]) -> None:
    """The learning curve and the files of ``report/``; written again they replace their older selves."""
    # matplotlib, which no training waits for before its first step
    from pipeline.charts.accuracy import learning_curve
    from pipeline.charts.style import in_both_kinds

    accuracy = [(e["step"], e["val/accuracy"], e.get("val/interval", 0.0)) for e in history if "val/accuracy" in e]
    loss = [(e["step"], e["train/loss"]) for e in history if "train/loss" in e]
    curve = in_both_kinds({"learning_curve": partial(learning_curve, accuracy, loss, run.name)})
    put_files(store, run_id, curve.items(), PLOTS)
    where = folders.join(run.uri, REPORT)
    put_files(store, run_id, _contents(where, folders.list_names(where)), REPORT)


def _contents(folder: str, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """One file at a time: weights may be large."""
    return ((name, folders.read_bytes(folders.join(folder, name))) for name in names)


def _finish(store: Store, run_id: str, ended: bool) -> None:
    run = store.client.get_run(run_id)
    alive = run.data.tags.get(ALIVE, "")
    trains = run.info.status == "RUNNING" and alive.isdecimal() and time.time() - int(alive) < 2 * BEAT
    if run.info.status != "FINISHED" and (ended or not trains):
        store.client.set_terminated(run_id, status="FINISHED")
