"""Ray and the processes of a run, started while the job imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR

from pipeline.config import compose
from pipeline.training import early, preload
from pipeline.training.beforehand import Beforehand

ROOT = Path(__file__).resolve().parents[2]

REUSED = """
import os, sys, time
from pathlib import Path
import psutil
from pipeline.config import compose
from pipeline.training.early import started_early
from pipeline.training.preload import TICKETS

notes, raw = Path(sys.argv[1]), compose("train", sys.argv[2:])
with started_early(raw):
    deadline = time.monotonic() + 120
    while os.listdir(os.environ[TICKETS]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.listdir(os.environ[TICKETS]), "Ray did not start all that it was asked for"
    ready = {child.pid for child in psutil.Process().children(recursive=True)}
    from pipeline.training.launch import launch, prepare
    config, _, run = prepare(raw)
    launch(config, run)
used = {int(note.stem.rpartition("-")[2]) for note in notes.glob("*.jsonl")}
assert len(used) == 2, used
assert used <= ready, f"workers {used} are not of those that were started beforehand: {ready}"
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_workers_of_a_run_are_those_that_were_started_beforehand(glyphs: str, tmp_path: Path) -> None:
    root, name = os.path.split(glyphs)
    notes = tmp_path / "notes"
    notes.mkdir()
    overrides = [
        "method=prototypical", "method.name=tests.cluster.recorded.Recorded", f"+method.notes={notes}", "steps=2",
        "train.way=5", "train.query=3", "train.tasks=2", "backbone.width=8", "validation.episodes=4",
        "validation.every=2", "validation.query=5", "evaluation=null", "register_as=null", "tracking=none",
        f"data.root={root}", f"data.name={name}", f"storage={tmp_path}/runs",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", REUSED, str(notes), *overrides],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=390,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


LEAN = """
import sys
from pipeline.config import compose
from pipeline.training import tracked

def stop(*arguments):
    sys.exit(", ".join(sorted({"mlflow", "scipy", "matplotlib", "torch._dynamo"} & set(sys.modules))))

tracked.launch = stop
tracked.train_only(compose("train", sys.argv[1:]))
"""


def test_a_run_is_launched_before_what_only_its_end_needs_is_imported(glyphs: str, tmp_path: Path) -> None:
    root, name = os.path.split(glyphs)
    place = [f"data.root={root}", f"data.name={name}", f"storage={tmp_path}", f"tracking.uri=sqlite:///{tmp_path}/t.db"]
    done = subprocess.run([sys.executable, "-c", LEAN, *place], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, "\n"), done.stdout + done.stderr


def test_every_ticket_is_taken_once_and_by_ray_trains_own_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_preload_python_modules", preload.TICKETS):
        monkeypatch.setenv(name, "")
    processes = Beforehand(2)
    monkeypatch.delenv(RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR, raising=False)
    assert not preload.ticket(), "a process that is not Ray Train's"
    monkeypatch.setenv(RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR, "0")
    assert [preload.ticket() for _ in range(4)] == [True, True, True, False], "a controller and two workers"
    processes.close()
    assert not preload.ticket() and not os.path.exists(os.environ[preload.TICKETS])


def test_a_ray_without_the_request_starts_them_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_preload_python_modules", preload.TICKETS):
        monkeypatch.setenv(name, "")

    def gone(runtime_env: str, count: int) -> None:
        raise AttributeError("PrestartWorkers")

    monkeypatch.setattr("pipeline.training.beforehand._request", gone)
    processes = Beforehand(2)
    processes.start()
    assert not os.path.exists(os.environ[preload.TICKETS]), "nobody imports torch for nothing"


@pytest.mark.parametrize(
    "overrides", [["resume=x"], ["cluster.address=auto"], ["cluster.workers=-1"]], ids=["resume", "address", "wrong"]
)
def test_what_is_not_this_machines_to_start_is_left_alone(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "start_ray", lambda cluster: pytest.fail("Ray was started"))
    with early.started_early(compose("train", overrides)):
        pass
