"""The folders of runs: ``run.json``, the checkpoints, and ``report/``."""

import json
from dataclasses import dataclass, replace
from typing import Any

from pipeline import store
from pipeline.commands import command, going_on
from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.renamed import current

RUN_FILE = "run.json"
STATE = "state.json"  # of a checkpoint
REPORT, EVALUATION, CALIBRATION = "report", "evaluation.json", "calibration.json"  # a folder, and files in it
START = "start"  # folder of a run with the checkpoint of another one, from where it goes on


@dataclass(frozen=True)
class Run:
    """A run: its folder holds ``run.json`` and the checkpoints."""

    name: str
    uri: str
    config: Config
    spec: dict[str, Any]
    dataset: dict[str, Any]
    arguments: tuple[str, ...] = ()  # of the command that began it
    again: tuple[str, ...] = ()  # of the command that goes on with it, what its folder does not know

    @property
    def resume(self) -> str:
        """The command that goes on with the run, from any folder, or with the job that the run is a part of."""
        return going_on(command("train", f"resume={self.uri}", *self.again))


def checkpoints(run_uri: str) -> list[str]:
    """The checkpoint folders of a run, oldest first."""
    names = [name for name in store.list_names(run_uri) if name.startswith("step_")]
    return [store.join(run_uri, name) for name in names if store.exists(store.join(run_uri, name, STATE))]


def step_of(checkpoint: str) -> int:
    """The step after which a checkpoint was written, by its folder's name: "step_00000500", or ".1" of a second try."""
    return int(checkpoint.rpartition("step_")[2].partition(".")[0])


def steps_done(run_uri: str) -> int:
    return max(map(step_of, checkpoints(run_uri)), default=0)


def read_state(checkpoint: str) -> dict[str, Any]:
    """What a checkpoint's folder says of it, as it was written."""
    return dict(json.loads(store.read_bytes(store.join(checkpoint, STATE))))


def accuracy_at(checkpoint: str) -> float | None:
    """Validation accuracy of a checkpoint, where its step was validated."""
    state = read_state(checkpoint)
    found = [e["val/accuracy"] for e in state["history"] if e["step"] == state["step"] and "val/accuracy" in e]
    return found[-1] if found else None


def best_checkpoint(run_uri: str) -> str:
    """The checkpoint a run stands for, by ``validation.select``: the one with the highest validation accuracy (the
    first of equals), or the last."""
    run, found = read_run(run_uri), checkpoints(run_uri)
    if not found:
        raise PipelineError(f"run {run.name} has no checkpoint yet; go on with it: {run.resume}")
    if run.config["validation"]["select"] == "last":
        return found[-1]
    validated = [(accuracy, -step_of(uri), uri) for uri in found if (accuracy := accuracy_at(uri)) is not None]
    return max(validated)[2] if validated else found[-1]


def write_run(run: Run) -> None:
    """Make the run's folder, unless it is there; a run that is to be longer says so there."""
    where = store.join(run.uri, RUN_FILE)
    if not store.exists(where) or _length(read_run(run.uri)) != _length(run):
        store.write_bytes(where, _description(run))


def _length(run: Run) -> tuple[Any, ...]:
    """What decides when a run ends."""
    return run.config["steps"], run.config["validation"].get("patience")


def claim_run(run: Run, named: bool) -> Run:
    """Make the folder of a new run, which nobody else has; the run, as it is called there.

    ``named``: whether the user chose its name; another one is numbered where it is taken.
    """
    folder, first, number = run.uri.removesuffix(f"/{run.name}"), run.name, 1
    while not store.create_bytes(store.join(run.uri, RUN_FILE), _description(run)):
        if named:
            raise PipelineError(f"name={first}: another job just began a run of this name in {folder}; give another")
        number += 1
        name = f"{first}-{number}"
        run = replace(run, name=name, uri=store.join(folder, name), config={**run.config, "name": name})
    return run


def _description(run: Run) -> bytes:
    record = {key: getattr(run, key) for key in ("name", "config", "spec", "dataset", "arguments")}
    return json.dumps(record, indent=1).encode()


def read_run(uri: str) -> Run:
    """A run by its folder."""
    where = store.join(uri, RUN_FILE)
    if not store.exists(where):
        raise PipelineError(f"no run at {uri}: it has no {RUN_FILE}")
    try:
        record = json.loads(store.read_bytes(where))
        arguments = tuple(map(str, record.get("arguments", ())))
        config = _here(current(record["config"]), uri, record["name"])
        return Run(record["name"], uri, config, record["spec"], record["dataset"], arguments)
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{where} is not a run's description ({error})") from error


def _here(config: Config, uri: str, name: str) -> Config:
    """A run's configuration with the folder of runs that it is in: it may have been moved since it began."""
    storage, _, folder = uri.rstrip("/").rpartition("/")
    known = folder == name and (store.is_remote(uri) or uri.startswith("/"))
    moved = known and storage != str(config.get("storage", storage)).rstrip("/")
    return {**config, "storage": storage} if moved else config


def find_run(name: str, storage: str) -> Run:
    """A run by its name in ``storage``, or by the path or URI of its folder."""
    for uri in store.places(name, storage):
        if store.exists(store.join(uri, RUN_FILE)):
            uri = uri.rstrip("/") if store.is_remote(uri) else store.open_store(uri)[1]
            return read_run(uri)
    if store.is_remote(name):
        raise PipelineError(f"no run {name!r}: it has no {RUN_FILE}")
    known = [entry for entry in store.list_names(storage) if store.exists(store.join(storage, entry, RUN_FILE))]
    raise PipelineError(f"no run {name!r} in {storage}; it has {', '.join(known[-5:]) or 'none'}")
