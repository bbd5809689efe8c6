"""What an evaluation measured, as a small JSON file that holds all it takes to measure it again."""

import json
import os
import re
import shlex
import sys
from typing import Any

from pipeline import store
from pipeline.config import Config, Section, as_argument, compose, flat, validate
from pipeline.environment import code_version, machine
from pipeline.evaluation.protocols import EvaluateConfig
from pipeline.registry.masking import mask_argument
from pipeline.training.checkpoint import Checkpoint, load_checkpoint
from pipeline.training.runs import RUN_FILE, STATE, Run, read_run
from pipeline.weights import origin_of

# Keys of the machine, not of the measurement.
_HERE = ("storage", "data", "name", "tracking", "resume", "initial", "register_as")
# The same on a command line.
_ARGUMENTS = (
    "storage=", "data.root=", "name=", "tracking", "register_as=", "cluster.object_store_mb=", "record=", "output=",
    "run=", "--",
)  # fmt: skip


def record(
    path: str,
    run: Run,
    checkpoint: Checkpoint,
    results: list[dict[str, Any]],
    config: EvaluateConfig,
    comparison: list[dict[str, Any]] | None = None,
) -> None:
    """Write what was measured, and all it takes to measure it again; ``comparison`` with another run, in pairs."""
    history = checkpoint.history
    content = {
        "command": _trained_by(run),
        "evaluation": shlex.join(["python", "-m", "jobs.evaluate", "run=RUN", *_arguments("evaluate", config)]),
        "protocol": config.protocol,
        "code": code_version(),
        **_about(checkpoint),
        "curve": [[e["step"], e["val/accuracy"], e["val/interval"]] for e in history if "val/accuracy" in e],
        "results": results,
        **({"comparison": comparison} if comparison else {}),
    }
    store.write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def record_comparison(
    path: str, runs: list[tuple[Run, Checkpoint, str]], found: dict[str, Any], protocol: str, config: Section
) -> None:
    """Write a comparison of (run, checkpoint, "meta" or "classical"), and all it takes to make it again.

    ``found`` has the "results" and "comparisons" that :mod:`pipeline.pages.comparison_tables` makes tables of.
    """
    content = {
        "command": shlex.join(["python", "-m", "jobs.report", *_arguments("report", config)]),
        "protocol": protocol,
        "code": code_version(),
        "runs": [
            {"name": run.name, "kind": kind, "command": _trained_by(run), **_about(checkpoint)}
            for run, checkpoint, kind in runs
        ],
        "machine": machine(),
        **found,
    }
    store.write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def _trained_by(run: Run) -> str:
    return shlex.join(["python", "-m", "jobs.train", *_portable([mask_argument(a) for a in run.arguments])])


def _about(checkpoint: Checkpoint) -> dict[str, Any]:
    initial = checkpoint.config.get("initial")
    begun = {} if initial is None else _begun(initial.rstrip("/"))
    return {
        "method": checkpoint.spec["method"]["name"],
        "dataset": {key: checkpoint.dataset[key] for key in ("name", "fingerprint")},
        "steps": checkpoint.step,
        "weights": origin_of(checkpoint.spec, checkpoint.dataset.get("uri")),
        "seed": checkpoint.config["seed"],
        "train_seconds": round(_seconds(checkpoint.history, checkpoint.config["log_every"])),
        "machine": machine(),
        "config": _anywhere(checkpoint.config),
        **begun,
    }


def _begun(place: str) -> dict[str, Any]:
    """The training of the run whose checkpoint another began with, which its own goes on from; the checkpoint's name
    alone where that is no run's, as a retraining's champion, or is there no more."""
    folder, _, name = place.rpartition("/")
    if not all(map(store.exists, (store.join(folder, RUN_FILE), store.join(place, STATE)))):
        return {"began_with": f"{folder.rpartition('/')[2]}/{name}"}
    return {"initial": {"command": _trained_by(read_run(folder)), **_about(load_checkpoint(place))}}


def _anywhere(config: Config) -> Config:
    """The configuration without the folders of one machine: files of a backbone keep their names, a teacher its run."""
    kept = {key: value for key, value in config.items() if key not in _HERE}
    files = {key: kept["backbone"][key] for key in ("weights", "path") if kept["backbone"].get(key)}
    kept["backbone"] = kept["backbone"] | {key: value.rpartition("/")[2] for key, value in files.items()}
    if kept["method"].get("teacher"):  # RUN/step_NUMBER
        kept["method"] = kept["method"] | {"teacher": kept["method"]["teacher"].rstrip("/").split("/")[-2]}
    return kept


def _seconds(history: list[dict[str, float]], log_every: int) -> float:
    """Wall-clock seconds of training, without what restarts repeated."""
    logged = [entry for entry in history if "train/steps_per_s" in entry]
    steps = [entry["step"] for entry in logged]
    windows = [b - a for a, b in zip([0, *steps], steps, strict=False)]
    return sum(min(w, log_every) / e["train/steps_per_s"] for w, e in zip(windows, logged, strict=True))


def _arguments(job: str, config: Section) -> list[str]:
    """Those of the job that this process is; where a program called it, what its configuration has of its own."""
    if os.path.basename(sys.argv[0]) == f"{job}.py":
        given = sys.argv[1:]
    else:
        usual = flat(validate(type(config), compose(job)).model_dump(by_alias=True))
        own = flat(config.model_dump(by_alias=True))
        given = [as_argument(key, value) for key, value in own.items() if key not in usual or usual[key] != value]
    return _portable([mask_argument(argument) for argument in given])


def _portable(overrides: list[str]) -> list[str]:
    kept = [override for override in overrides if not override.startswith(_ARGUMENTS)]
    return [re.sub(r"^runs=/.*/", "runs=", override) for override in kept]  # an archive's place
