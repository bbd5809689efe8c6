"""A real MLflow server: away at the start and in the middle of a training, back, and then the way to a pulled model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import requests

from pipeline.registry import tracker as tracker_module
from pipeline.registry.publish import publish
from pipeline.registry.tracker import Tracker
from pipeline.registry.versions import pull, register_run, set_alias
from tests.registry.conftest import CONFIG, DATASET, SPEC, entry
from tests.registry.test_publish import check_whole

Server = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Server, Callable[[], None]]]:
    """The server's URI, a function that starts it and one that stops it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    running: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
        command += ["--artifacts-destination", str(tmp_path / "served")]
        with open(tmp_path / "server.log", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        running.append(process)
        for _ in range(600):
            try:
                if requests.get(f"{uri}/health", timeout=1).ok:
                    return process
            except requests.RequestException:
                time.sleep(0.2)
        raise AssertionError((tmp_path / "server.log").read_text()[-2000:])

    def stop() -> None:
        while running:
            process = running.pop()
            os.killpg(process.pid, signal.SIGKILL)  # the group is this server's own session
            process.wait()

    try:
        yield uri, start, stop
    finally:
        stop()


@pytest.mark.slow
def test_a_server_that_comes_and_goes(
    server: tuple[str, Server, Callable[[], None]],
    run: Path,
    tmp_path: Path,
    pictures: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracker_module, "LONGEST_WAIT", 1.0)
    uri, start, stop = server
    tracking = {"uri": uri, "artifacts": None, "experiment": "tests", "timeout": 60}
    tracker = Tracker("first-run", tracking, CONFIG, DATASET)  # there is no server yet
    tracker.log(1, {"train/loss": 2.0})
    start()
    tracker.log(2, {"train/loss": 1.0})
    deadline = time.monotonic() + 60
    while tracker._delivered < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert tracker._delivered == 2
    stop()
    for step in range(3, 7):
        tracker.log(step, {k: v for k, v in entry(step).items() if k != "step"})
    time.sleep(1.5)
    start()
    assert tracker.close().message == ""
    publish(str(run), tracking)
    check_whole(tracking, tmp_path / "a", run)
    made = register_run(str(run), tracking)
    set_alias(tracking, made.name, "champion", made.version)
    assert register_run(str(run), tracking).version == made.version
    classifier = pull("models:/people@champion", tracking)
    assert classifier.spec == SPEC
    answers = classifier.classify(classifier.enrol(pictures[:5, 0], np.arange(5)), pictures[:5, 1])
    assert len(answers) == 5
