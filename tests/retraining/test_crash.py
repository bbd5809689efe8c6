"""Stopped at any boundary between its stages, or killed, a retraining is finished by the next run, with one outcome."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline import workflow
from pipeline.config import compose
from pipeline.registry import aliases
from pipeline.registry.aliases import DECISION_TAG
from pipeline.registry.versions import pull
from pipeline.retraining import run
from pipeline.retraining.journal import Journal
from pipeline.retraining.report import RETRAINING_TAG
from pipeline.retraining.run import retrain
from tests.retraining.conftest import add_classes, arguments

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

# Where it is stopped: a module, a function that it calls, and whether before or after the call.
STOPS: list[tuple[Any, str, str]] = [
    (run, "find_work", "before"),  # the data are up to date, nothing is noted
    (run, "_train", "before"),  # the work is noted
    (workflow, "register", "before"),  # trained and evaluated, published nowhere
    (run, "_train", "inside"),  # registered, not noted
    (run, "_decide", "before"),
    (run, "measure", "after"),  # measured, not noted
    (run, "settle", "before"),  # the decision is noted
    (aliases, "_record", "before"),  # the aliases have moved, the decision is not recorded
    (run, "settle", "after"),  # settled, not noted
    (run, "write_report", "before"),
    (run, "write_report", "after"),
    (run, "say_end", "before"),  # all is done but the last lines
]


class Stop(BaseException):
    """The process ends here."""


def stopping(function: Callable[..., Any], when: str) -> Callable[..., Any]:
    def stopped(*args: Any, **kwargs: Any) -> Any:
        if when != "before":
            function(*args, **kwargs)
        raise Stop

    return stopped


def retrained(home: Path, *more: str) -> dict[str, Any]:
    return retrain(compose("retrain", arguments(home, *more)))


def client(home: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{home}/mlflow.db")


def left_behind(home: Path) -> dict[str, Any]:
    """Everything that must not depend on interruptions."""
    store = client(home)
    [experiment] = [e.experiment_id for e in store.search_experiments() if e.name != "Default"]
    runs = store.search_runs([experiment])
    tracking = {
        "uri": f"sqlite:///{home}/mlflow.db", "artifacts": None, "experiment": "few-shot", "timeout": 5,
    }  # fmt: skip
    versions = store.search_model_versions("name='people'")
    decisions = [json.loads(version.tags[DECISION_TAG]) for version in versions]
    for decision in decisions:
        decision["figures"].pop("dataset", None)
    [entry] = Journal(f"{home}/runs/people.retraining").entries
    return {
        "models": sorted(model.name for model in store.search_registered_models()),
        "aliases": {name: int(v) for name, v in store.get_registered_model("people").aliases.items()},
        "versions": [version.version for version in versions],
        "weights": pull("models:/people@champion", tracking).fingerprint,
        "decisions": decisions,
        "decision runs": sum(DECISION_TAG in found.data.tags for found in runs),
        "reports": sum(RETRAINING_TAG in found.data.tags for found in runs),
        "training runs": sum("pipeline.run" in found.data.tags for found in runs),
        "status": {found.info.status for found in runs},
        "entry": (entry.run, entry.stage, entry.outcome, entry.reason, entry.version, entry.failures),
        "files": sorted(path.name for path in (home / "runs" / "people.retraining").iterdir()),
    }


def test_stopped_at_every_boundary(
    ray_session: Any, home: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path
) -> None:
    """One retraining, stopped twelve times, each time one stage later; the thirteenth call ends it."""
    for module, name, when in STOPS:
        with pytest.MonkeyPatch.context() as patch:
            if when == "inside":  # between the registered version and its line in the journal
                patch.setattr(workflow, "train", stopping(workflow.train, "after"))
            else:
                patch.setattr(module, name, stopping(getattr(module, name), when))
            with pytest.raises(Stop):
                retrained(home)
        assert [model.name for model in client(home).search_registered_models() if "lock" in model.name] == []
    last = retrained(home)
    assert last["outcome"] == "unchanged" and last["exit_code"] == 4  # the twelfth stop was after its last line

    calm = tmp_path_factory.mktemp("calm")
    shutil.copy(empty_database, calm / "mlflow.db")
    add_classes(calm / "images", range(24))
    done = retrained(calm)
    assert done["outcome"] == "promoted" and done["exit_code"] == 0
    assert left_behind(home) == left_behind(calm)


def test_a_training_that_fails_again_and_again_is_given_up(ray_session: Any, home: Path) -> None:
    def failing(config: Any) -> Any:
        raise RuntimeError("out of luck")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "train", failing)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="out of luck"):
                retrained(home)
        third = retrained(home)
    assert third["outcome"] == "kept" and third["exit_code"] == 3
    failed = "training failed 3 times and is given up, the last time with: out of luck; try again with"
    assert third["reason"].startswith(failed) and third["version"] is None
    later = retrained(home)
    assert later["outcome"] == "unchanged" and "was given up" in later["reason"]
    add_classes(home / "images", range(24, 26))  # other data: another try
    assert retrained(home)["outcome"] == "promoted"


def test_data_that_change_while_it_is_interrupted_begin_anew_and_a_warm_start_has_the_champions_weights(
    ray_session: Any, home: Path
) -> None:
    assert retrained(home)["champion"] == 1
    add_classes(home / "images", range(24, 30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_train", stopping(run._train, "before"))
        with pytest.raises(Stop):
            retrained(home, "retrain.start=warm")
    add_classes(home / "images", range(30, 36))
    done = retrained(home, "retrain.start=warm", "optimizer.lr=1e-9", "steps=1", "validation.every=1")
    assert done["outcome"] == "kept" and done["champion_before"] == 1
    entries = Journal(f"{home}/runs/people.retraining").entries
    assert [entry.outcome for entry in entries] == ["promoted", "superseded", "kept"]
    made = client(home).get_model_version("people", "1").creation_timestamp
    assert entries[2].initial == f"{home}/runs/people.retraining/champion-1-{made}"
    # One step of nothing from the champion's weights: it answers as the champion does.
    assert done["accuracy.challenger"] == pytest.approx(done["accuracy.champion"], abs=0.02)
    assert abs(done["difference"]) < 0.02


@pytest.mark.timeout(1800)
def test_killed_in_training_and_finished_by_the_next_run(home: Path) -> None:
    command = [sys.executable, "-m", "jobs.retrain", *arguments(home, "steps=4000", "log_every=4"), "--json"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 900
    checkpoints: list[Path] = []
    while not checkpoints and process.poll() is None and time.monotonic() < deadline:
        checkpoints = list(home.glob("runs/people-*/step_*/state.json"))
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert checkpoints, "killed before its first checkpoint"
    [entry] = Journal(f"{home}/runs/people.retraining").entries
    assert entry.stage == "begun" and client(home).get_experiment_by_name("people.retraining-lock")  # its lease is left
    step = max(int(path.parent.name.removeprefix("step_")) for path in checkpoints)
    assert step < 4000
    second = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=900)
    assert second.returncode == 0, second.stderr
    summary = json.loads(second.stdout)
    assert summary["outcome"] == "promoted" and summary["run"] == entry.run and summary["version"] == 1
    assert "was interrupted: going on with it" in second.stderr
    assert [model.name for model in client(home).search_registered_models()] == ["people"]
