"""A run that goes on: its stored configuration, and what may change of it."""

import copy
import os
from dataclasses import replace
from typing import Any

from pipeline import store
from pipeline.commands import from_anywhere
from pipeline.config import Config, as_argument, compose, flat, given_keys, validate
from pipeline.data.dataset import read_manifest
from pipeline.errors import PipelineError
from pipeline.model import build_model
from pipeline.ray_start import in_submitted_job
from pipeline.training import runs
from pipeline.training.check import check_batches
from pipeline.training.config import TrainConfig
from pipeline.training.loop import rounds_since_best, should_stop
from pipeline.training.paths import absolute
from pipeline.training.runs import Run, find_run

_GROUPS = ("data", "method", "backbone", "optimizer", "schedule", "tracking")  # whose keys depend on the choice made


def resumed(raw: Config) -> tuple[TrainConfig, Config, Run]:
    """The stored configuration of a run, with what was given of where it and its dataset are now (cluster, tracking,
    data.root), and of how long it is to be."""
    given = given_keys("train", raw)
    for key in given:
        if key.split(".")[0] not in ("resume", "storage", "cluster", "tracking") and key not in ("data.root", "steps"):
            raise PipelineError(f"{key}: a resumed run keeps its stored configuration; leave it out or begin a new run")
    name, storage = str(raw["resume"]), str(raw["storage"])
    if not (store.is_remote(name) or os.path.isabs(name)):
        storage = absolute("storage", storage)
    run = find_run(name, storage)
    if run.uri.rpartition("/")[2] != run.name:  # Ray Train and MLflow know a run by its name
        raise PipelineError(
            f"resume={run.uri}: this is a copy of run {run.name}, or it was renamed: call its folder {run.name}, in "
            "another folder of runs where that one has a run of this name"
        )
    stored = _completed(run.config)
    if "steps" in given:
        _lengthen(run, stored, raw["steps"])
        kept = [argument for argument in run.arguments if not argument.startswith("steps=")]
        run = replace(run, arguments=(*kept, f"steps={raw['steps']}"))
    if "data.root" in given:
        stored["data"]["root"] = absolute("data.root", str(raw["data"]["root"]))
    before, run = flat(run.config), replace(run, config=stored)
    stored = copy.deepcopy(stored)
    for part in ("cluster", "tracking"):
        named = {key.partition(".")[2]: raw[part][key.partition(".")[2]] for key in given if key.startswith(f"{part}.")}
        stored[part] |= from_anywhere(named) if part == "tracking" and not in_submitted_job() else named
    now = flat(stored)
    again = [
        key for key in given if key.startswith(("cluster.", "tracking.", "data.root")) and now[key] != before.get(key)
    ]
    run = replace(run, again=tuple(as_argument(key, now[key]) for key in again))
    stored["storage"] = run.uri.removesuffix(f"/{run.name}")  # the folder of runs may have moved
    config = validate(TrainConfig, stored)
    if config.cluster.workers != run.config["cluster"]["workers"]:
        check_batches(config, build_model(run.spec))
        print(
            f"run {run.name}: {config.cluster.workers} workers from here on, {run.config['cluster']['workers']} at its "
            "beginning: every step has the same episodes, and their sums differ in the last bits; batch-norm's "
            "statistics and augmentation's draws are each worker's own, and so are others where a run has them",
            flush=True,
        )
    found = read_manifest(config.dataset_uri).fingerprint
    if found != run.dataset["fingerprint"]:
        raise PipelineError(f"resume={run.name}: the dataset at {config.dataset_uri} has changed since the run began")
    return config, stored, run


def _lengthen(run: Run, stored: Config, steps: Any) -> None:
    """Another number of steps for a run that is resumed: what has been trained stays, the schedule is the new one's."""
    done = runs.steps_done(run.uri)
    if not isinstance(steps, int) or steps < done:
        raise PipelineError(f"steps={steps}: run {run.name} has {done:,} steps already; give as many or more")
    schedule = stored["schedule"]["name"]
    print(
        f"run {run.name}: {steps:,} steps instead of {stored['steps']:,}; from here on its learning rate is that of "
        f"schedule {schedule} over {steps:,} steps",
        flush=True,
    )
    stored["steps"] = steps
    patience = stored["validation"]["patience"]
    if patience is None or steps == done:
        return
    history = runs.read_state(runs.checkpoints(run.uri)[-1])["history"] if done else []
    if should_stop(history, patience):  # more steps are asked for: rounds that ended it count no more
        behind = rounds_since_best(history)
        stored["validation"]["patience"] = patience + behind
        print(
            f"run {run.name}: validation.patience={patience} had ended it; {patience} more rounds without a better "
            f"accuracy end it again (validation.patience={patience + behind} with the {behind} that are behind it)",
            flush=True,
        )


def _completed(stored: Config) -> Config:
    """A stored configuration with the keys that came after it was stored, as they are where nothing is said."""
    whole = copy.deepcopy(stored)
    for section, value in compose("train").items():
        known = whole.setdefault(section, value)
        if isinstance(value, dict) and isinstance(known, dict) and section not in _GROUPS:
            whole[section] = {**value, **known}
    return whole
