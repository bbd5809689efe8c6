"""One MLflow run a training run: found by its tag, completed by whoever comes, never doubled."""

import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag

from pipeline.config import config_hash, flat, to_yaml
from pipeline.environment import code_version, describe_environment
from pipeline.registry.masking import mask
from pipeline.registry.tracking import RUN_TAG, Store, find_run
from pipeline.weights import origin_of

Point = tuple[str, int]  # name and step of a metric
ALIVE = "pipeline.alive"  # tag with the time, in seconds since 1970, of the driver's last sign of life
CHANGED = "pipeline.changed."  # and the key: tag with a parameter's value of now, since MLflow keeps its first one
CONFIG, ENVIRONMENT = "config.yaml", "environment.json"
_METRICS_AT_ONCE, _PARAMS_AT_ONCE, _LONGEST_PARAM = 1000, 100, 6000


def open_run(store: Store, name: str, config: Mapping[str, Any], dataset: Mapping[str, Any]) -> str:
    """Id of the MLflow run of ``name``, made where it is missing, with tags, parameters, configuration, environment.

    What changed in the configuration since is told by tags, and by its file.
    """
    run = find_run(store, name)
    if run is None:
        run = store.client.create_run(store.experiment_id, run_name=name, tags={RUN_TAG: name})
    run_id = run.info.run_id
    known_tags, known_params = run.data.tags, run.data.params
    masked = mask(dict(config))
    tags = origin_tags(masked, dataset)
    pretrained = origin_of(config, dataset.get("uri")) if "backbone" in config else None  # a campaign has none
    if pretrained is not None:
        tags["backbone.weights"] = pretrained
    params = {key: _param(v) for key, v in {**flat(masked), "dataset.uri": mask(str(dataset.get("uri")))}.items()}
    new_params = [Param(key, value) for key, value in params.items() if key not in known_params]
    changed = {  # of a run that is to be longer, say
        f"{CHANGED}{key}": value
        for key, value in params.items()
        if known_tags.get(f"{CHANGED}{key}", known_params.get(key, value)) != value
    }
    new_tags = [RunTag(key, value) for key, value in tags.items() if key not in known_tags]
    new_tags += [RunTag(key, value) for key, value in changed.items()]
    present = {item.path for item in store.client.list_artifacts(run_id)}
    if CONFIG not in present or changed:
        store.client.log_text(run_id, to_yaml(masked), CONFIG)
    if ENVIRONMENT not in present:
        store.client.log_text(run_id, json.dumps(describe_environment(), indent=1), ENVIRONMENT)
    for start in range(0, max(len(new_params), 1), _PARAMS_AT_ONCE):  # after the files, which changes are told by
        part = new_params[start : start + _PARAMS_AT_ONCE]
        if part or new_tags:
            store.client.log_batch(run_id, params=part, tags=new_tags)
        new_tags = []
    return run_id


def origin_tags(masked: Mapping[str, Any], dataset: Mapping[str, Any]) -> dict[str, str]:
    """Of what a run, or a version of a model, was made: data, configuration and code."""
    return {
        "dataset.name": str(dataset.get("name")),
        "dataset.fingerprint": str(dataset.get("fingerprint")),
        "config.hash": config_hash(dict(masked)),
        "code.version": code_version(),
    }


def put_files(store: Store, run_id: str, files: Iterable[tuple[str, bytes]], folder: str | None = None) -> None:
    """Upload files by name, which may have folders of their own; those that are there are replaced."""
    with tempfile.TemporaryDirectory() as stage:
        for name, content in files:
            path = Path(stage, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if os.listdir(stage):
            store.client.log_artifacts(run_id, stage, folder)


def delivered_points(store: Store, run_id: str) -> set[Point]:
    """Every (metric, step) that the run has."""
    names = store.client.get_run(run_id).data.metrics
    return {(name, point.step) for name in names for point in store.client.get_metric_history(run_id, name)}


def log_metrics(store: Store, run_id: str, metrics: Iterable[Metric]) -> int:
    """Deliver metrics in as few requests as allowed; the number of them."""
    pending = list(metrics)
    for start in range(0, len(pending), _METRICS_AT_ONCE):
        store.client.log_batch(run_id, metrics=pending[start : start + _METRICS_AT_ONCE])
    return len(pending)


def conclude(store: Store, run_id: str, figures: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    """End a run that tells of something done: ``figures``, as far as they are fractions, and ``texts`` as files."""
    now = int(time.time() * 1000)
    log_metrics(store, run_id, [Metric(name, f, now, 0) for name, f in figures.items() if isinstance(f, float)])
    for name, text in texts.items():
        store.client.log_text(run_id, text, name)
    store.client.set_terminated(run_id)


def sign_of_life(store: Store, run_id: str) -> None:
    """Note that the driver of a run lives."""
    store.client.set_tag(run_id, ALIVE, str(int(time.time())))


def end_lost(store: Store, silence: float) -> None:
    """End, as killed, the runs of the experiment whose drivers have given no sign of life for ``silence`` seconds.

    A driver that is killed cannot say so: the next one does it for it. One that lives and did not reach the store says
    that it runs when it does.
    """
    running = store.client.search_runs([store.experiment_id], "attributes.status = 'RUNNING'", max_results=1000)
    for run in running:
        alive = run.data.tags.get(ALIVE, "")
        if alive.isascii() and alive.isdigit() and time.time() - int(alive) > silence:
            why = f"its driver gave no sign of life for {silence / 60:g} minutes"
            store.client.set_tag(run.info.run_id, "pipeline.ended", why)
            store.client.set_terminated(run.info.run_id, status="KILLED", end_time=1000 * int(alive))


def _param(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, list | dict) else str(value)
    return text if len(text) <= _LONGEST_PARAM else f"{text[: _LONGEST_PARAM - 3]}..."
