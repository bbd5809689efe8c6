"""How a training that ends, in whatever way, stands in MLflow, and with which status its job ends."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import workflow
from pipeline.errors import Diverged, PipelineError, Stopped, Unavailable
from pipeline.registry import publish as publish_module
from pipeline.registry import tracker as tracker_module
from pipeline.registry.tracking import connect
from pipeline.registry.tracking_config import check_tracking
from pipeline.training.runs import read_run
from tests.registry.test_publish import only_run


@pytest.fixture
def trained(run: Path, tracking: dict, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``workflow.train`` of a run that is trained already, with what its launch raises."""
    config: Any = SimpleNamespace(
        tracking=tracking, method={"name": "prototypical"}, steps=12, evaluation=None, register_as=None
    )
    found = read_run(str(run))
    monkeypatch.setattr(workflow, "prepare", lambda raw: (config, {}, found))
    monkeypatch.setattr(workflow, "begin", lambda config, run, resumed: run)

    def train(error: BaseException | None = None) -> dict[str, Any]:
        def launch(config: Any, run: Any, log: Any) -> None:
            log({"step": 1, "train/loss": 1.0})
            if error is not None:
                raise error

        monkeypatch.setattr(workflow, "launch", launch)
        return workflow.train({"resume": found.name})

    return train


def test_stopped_is_killed_and_the_end_is_the_ends(trained: Any, tracking: dict) -> None:
    for error, state in (
        (Stopped("asked to end"), "KILLED"),
        (Diverged("the loss is NaN"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (None, "FINISHED"),
    ):
        if error is None:
            assert "exit_code" not in trained()
        else:
            with pytest.raises(type(error)):
                trained(error)
        assert only_run(tracking)[1].info.status == state


def test_an_evaluation_that_fails_ends_the_run(trained: Any, tracking: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: Any) -> Any:
        raise PipelineError("the checkpoint is damaged")

    monkeypatch.setattr(workflow, "model_of_run", fails)
    with pytest.raises(PipelineError, match="damaged"):
        trained()
    assert only_run(tracking)[1].info.status == "FAILED"


def test_asked_to_end_while_it_is_measured(trained: Any, tracking: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def measured(run: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(workflow, "model_of_run", measured)
    with pytest.raises(Stopped, match=r"measure and register it with: python -m jobs.train resume=/\S+/first-run$"):
        trained()
    assert only_run(tracking)[1].info.status == "KILLED" and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("kind", "status"), [(Unavailable, 75), (PipelineError, 6)])
def test_a_run_that_could_not_be_registered_has_a_status_of_its_own(
    trained: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: Any, status: int
) -> None:
    def publish(uri: str, tracking: Any) -> Any:
        raise kind("MLflow at http://server: nobody is there; later: python -m jobs.register run=RUN")

    monkeypatch.setattr(publish_module, "publish", publish)
    made = trained()
    assert made["exit_code"] == status and "nobody is there" in made["undelivered"]
    assert "not registered: MLflow at http://server: nobody is there" in capsys.readouterr().out


def test_a_server_of_nowhere_is_refused_before_a_submitted_training(monkeypatch: pytest.MonkeyPatch) -> None:
    server = {"artifacts": None, "experiment": "few-shot", "timeout": 60}
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        server["uri"] = f"http://127.0.0.1:{place.getsockname()[1]}"
        check_tracking(server)  # on one's own machine it may be started later
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        with pytest.raises(Unavailable, match="the machine of the job, .* try again when it is back") as refusal:
            check_tracking(server)
        assert "\n" not in str(refusal.value) and "MLFLOW_TRACKING_URI" in str(refusal.value)
        place.listen()
        check_tracking(server)
    check_tracking({**server, "uri": "http://mlflow.example:5000"})  # nobody asks there before the training


def test_a_run_whose_driver_was_killed_is_ended_by_the_next_one(trained: Any, tracking: dict) -> None:
    """Of what says that it runs, only that which gave a sign of life, and long ago."""
    store = connect(tracking)
    made = {}
    for name, alive in (("lost", time.time() - 3600), ("alive", time.time() - 5), ("of-earlier-code", None)):
        made[name] = store.client.create_run(store.experiment_id, run_name=name).info.run_id
        if alive:
            store.client.set_tag(made[name], "pipeline.alive", str(int(alive)))
    trained()
    states = {name: store.client.get_run(run_id) for name, run_id in made.items()}
    assert {name: run.info.status for name, run in states.items()} == {
        "lost": "KILLED", "alive": "RUNNING", "of-earlier-code": "RUNNING",
    }  # fmt: skip
    assert "no sign of life for 20 minutes" in states["lost"].data.tags["pipeline.ended"]


def test_a_run_gives_signs_of_life_while_nothing_is_logged(
    run: Path, tracking: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "BEAT", 0.05)
    monkeypatch.setattr(tracker_module, "PATIENCE", 0.05)
    found = read_run(str(run))
    tracker = tracker_module.Tracker(found.name, tracking, found.config, found.dataset)
    try:
        deadline = time.monotonic() + 60
        while tracker._run_id is None and time.monotonic() < deadline:
            time.sleep(0.05)
        store = connect(tracking)

        def alive() -> str | None:  # read alone: MLflow refuses the first tag of one name from two writers at once
            return store.client.get_run(tracker._run_id).data.tags.get("pipeline.alive")

        while (first := alive()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        while alive() == first and time.monotonic() < deadline:
            time.sleep(0.05)
        assert int(alive() or 0) > int(first or 0) > 0
    finally:
        tracker.close(status="KILLED")


def test_asked_to_end_while_it_is_registered(
    trained: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def registered(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(workflow, "register", registered)
    with pytest.raises(Stopped, match=r"while it was registered, .*: python -m jobs.train resume=/\S+/first-run$"):
        trained()


@pytest.mark.parametrize("host", ["localhost", "[::1]", "0.0.0.0"])
def test_every_name_of_the_own_machine_is_seen(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(Unavailable, match="in a submitted job this is the machine of the job"):
        check_tracking({"uri": f"http://{host}:9", "artifacts": None, "experiment": "x", "timeout": 1})


def test_a_run_that_trains_on_is_running_though_its_figures_are_delivered(run: Path, tracking: dict) -> None:
    """``jobs.register`` and ``jobs.evaluate publish=true`` may be asked for while it trains."""
    store = connect(tracking)
    publish_module.publish(str(run), tracking)
    run_id = only_run(tracking)[1].info.run_id
    for alive, state in ((time.time() - 5, "RUNNING"), (time.time() - 3600, "FINISHED")):
        store.client.update_run(run_id, status="RUNNING")
        store.client.set_tag(run_id, "pipeline.alive", str(int(alive)))
        publish_module.publish(str(run), tracking, ended=False)
        assert only_run(tracking)[1].info.status == state
