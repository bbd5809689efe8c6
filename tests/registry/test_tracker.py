"""Live metrics: delivered once, whatever the store does, and training never waits."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.registry import record as record_module
from pipeline.registry import tracker as tracker_module
from pipeline.registry import tracking as tracking_module
from pipeline.registry.publish import publish
from pipeline.registry.tracker import Tracker
from tests.registry.conftest import CONFIG, DATASET, entry
from tests.registry.test_publish import check_whole, histories, only_run


def test_metrics_arrive_in_order_and_once(tracking: dict) -> None:
    tracker = Tracker("first-run", tracking, CONFIG, DATASET)
    for step in range(1, 11):
        tracker.log(step, {"train/loss": 1 / step})
    tracker.log(7, {"train/loss": 99.0})  # a worker died and computes the step again
    delivery = tracker.close()
    assert (delivery.delivered, delivery.lost, delivery.message) == (11, 0, "")
    resumed = Tracker("first-run", tracking, CONFIG, DATASET)
    for step in range(8, 15):
        resumed.log(step, {"train/loss": 1 / step if step > 10 else 99.0})
    assert resumed.close().lost == 0
    client, run = only_run(tracking)
    assert histories(client, run.info.run_id)["train/loss"] == [(s, 1 / s) for s in range(1, 15)]
    assert run.info.status == "RUNNING"
    assert not [thread for thread in threading.enumerate() if thread.name == "tracker"]


def test_a_run_says_what_its_first_weights_were_trained_on(tracking: dict) -> None:
    store = tracking_module.connect(tracking)
    begun = {"backbone": {"name": "timm", "weights_sha256": "1" * 64, "trained_on": "birds"}}
    for config, said in ((begun, "weights trained on birds, whose classes may be among those of the test"), ({}, None)):
        run_id = record_module.open_run(store, f"run {said}", config, {"name": "x", "fingerprint": "1"})
        assert store.client.get_run(run_id).data.tags.get("backbone.weights") == said


def test_the_state_of_a_run_is_that_of_its_training(run: Path, tracking: dict) -> None:
    """Asked to stop: killed; going on: running; the end is the end's."""

    def state() -> str:
        return only_run(tracking)[1].info.status

    for status in ("KILLED", None, "FAILED", None):
        tracker = Tracker("first-run", tracking, CONFIG, DATASET)
        tracker.log(1, {"train/loss": 1.0})
        assert tracker.close(status=status).message == ""
        assert state() == (status or "RUNNING")
    publish(str(run), tracking)
    assert state() == "FINISHED"


def test_publish_completes_what_the_tracker_began(run: Path, tracking: dict, tmp_path: Path) -> None:
    tracker = Tracker("first-run", tracking, CONFIG, DATASET)
    for step in range(1, 7):
        tracker.log(step, {k: v for k, v in entry(step).items() if k != "step"})
    tracker.close()
    publish(str(run), tracking)
    check_whole(tracking, tmp_path / "a", run)


def test_a_store_that_comes_back_gets_everything(tracking: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "FIRST_WAIT", 0.05)
    away = threading.Event()
    away.set()
    whole = MlflowClient.log_batch

    def log_batch(self: MlflowClient, *arguments: object, **named: object) -> object:
        if away.is_set():
            raise MlflowException("the server is away")
        return whole(self, *arguments, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    tracker = Tracker("first-run", tracking, CONFIG, DATASET)
    for step in range(1, 6):
        tracker.log(step, {"train/loss": 1 / step})
        time.sleep(0.05)
    away.clear()
    tracker.log(6, {"train/loss": 1 / 6})
    assert tracker.close().lost == 0
    client, run = only_run(tracking)
    assert histories(client, run.info.run_id)["train/loss"] == [(s, 1 / s) for s in range(1, 7)]


def test_a_server_that_is_away_costs_training_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = {"uri": "http://me:hunter2@127.0.0.1:9", "artifacts": None, "experiment": "tests", "timeout": 1}
    tracker = Tracker("first-run", server, CONFIG, DATASET)
    for step in range(1000):
        tracker.log(step, {"train/loss": 1.0, "train/accuracy": 0.5})
    delivery = tracker.close(timeout=1.5)
    assert delivery.lost == 2000 and delivery.delivered == 0
    assert delivery.message.startswith("2000 of 2000 tracked figures did not reach MLflow (")
    command = "python -m jobs.register run=/somewhere/runs/first-run 'tracking.uri=http://***@127.0.0.1:9'"
    assert f"deliver them with: {command} tracking.experiment=tests" in delivery.message
    assert "\n" not in delivery.message and "hunter2" not in delivery.message


@pytest.mark.parametrize(("patience", "logged"), [(3600.0, True), (0.01, False)])
def test_the_store_is_reached_for_with_the_first_figure_or_after_a_while(
    patience: float, logged: bool, tracking: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = threading.Event()
    connect = tracking_module.connect
    monkeypatch.setattr(tracking_module, "connect", lambda config: reached.set() or connect(config))
    monkeypatch.setattr(tracker_module, "PATIENCE", patience)
    tracker = Tracker("first-run", tracking, CONFIG, DATASET)
    if logged:
        assert not reached.is_set()
        tracker.log(1, {"train/loss": 1.0})
    assert reached.wait(60)
    assert tracker.close().message == ""
    only_run(tracking)


def test_nothing_goes_on_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is away for good: its thread ends with :meth:`Tracker.close`, which waits for no attempt."""
    tried = threading.Event()

    def refuse(*arguments: object) -> str:
        tried.set()
        raise MlflowException("the server is away")

    monkeypatch.setattr(tracking_module, "connect", refuse)
    server = {"uri": "http://127.0.0.1:9", "artifacts": None, "experiment": "tests", "timeout": 1}
    tracker = Tracker("first-run", server, CONFIG, DATASET)
    tracker.log(1, {"train/loss": 1.0})
    assert tried.wait(60)
    assert tracker.close(timeout=0.0).lost == 1
    assert tracker._thread is not None
    tracker._thread.join(60)
    assert not tracker._thread.is_alive()


def test_a_server_that_hangs_holds_up_nothing() -> None:
    """Neither a figure that is logged nor the end waits for an answer: here none ever comes."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        server = {"uri": uri, "artifacts": None, "experiment": "t", "timeout": 3600}
        tracker = Tracker("r", server, CONFIG, DATASET)
        for step in range(1000):
            tracker.log(step, {"train/loss": 1.0})
        delivery = tracker.close(timeout=0.5)
        assert tracker._thread is not None and tracker._thread.is_alive()  # the answer is still waited for, there
    assert delivery.lost == 1000 and "the store did not answer in time" in delivery.message


def test_what_is_no_number_is_named(tracking: dict) -> None:
    tracker = Tracker("first-run", tracking, CONFIG, DATASET)
    tracker.log(1, {"train/loss": 1.0, "note": "good"})  # type: ignore[dict-item]
    delivery = tracker.close()
    assert (delivery.delivered, delivery.lost, delivery.reason) == (1, 1, "note is not a number")


def test_room_is_bounded(tracking: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "CAPACITY", 10)
    held = threading.Event()
    open_run = record_module.open_run

    def wait(*arguments: object) -> str:
        held.wait(10)
        return open_run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(record_module, "open_run", wait)
    tracker = Tracker("first-run", tracking, CONFIG, DATASET)
    for step in range(25):
        tracker.log(step, {"train/loss": float(step)})
    held.set()
    delivery = tracker.close()
    assert (delivery.delivered, delivery.lost) == (10, 15) and "more than 10 waited" in delivery.message
    client, run = only_run(tracking)
    assert [step for step, _ in histories(client, run.info.run_id)["train/loss"]] == list(range(15, 25))


def test_a_failed_training_ends_the_run(tracking: dict) -> None:
    tracker = Tracker("first-run", tracking, CONFIG, DATASET)
    tracker.log(1, {"train/loss": 1.0})
    tracker.close(status="FAILED")
    assert only_run(tracking)[1].info.status == "FAILED"


def test_no_store_no_tracking() -> None:
    tracker = Tracker("r", {"uri": None, "artifacts": None, "experiment": "t", "timeout": 0}, CONFIG, DATASET)
    tracker.log(1, {"train/loss": 1.0})
    assert tracker.close() == tracker_module.Delivery(0, 0, "", "")
