"""One job at a time in a folder; nothing that a dead one left behind stands in the way of the next."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import workflow
from pipeline.config import compose
from pipeline.errors import Unavailable
from pipeline.search import run as search
from pipeline.training import alone as module
from pipeline.training.alone import alone
from pipeline.training.prepare import prepare
from pipeline.training.runs import write_run

HOLDER = """
import sys
from pipeline.training.alone import alone
with alone(sys.argv[1], "run a"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            says = rf"^run a: another job is at work in {tmp_path}; wait for its end, or end it, and try again$"
            with pytest.raises(Unavailable, match=says), alone(str(tmp_path), "run a"):
                pass
        finally:
            os.kill(other.pid, signal.SIGKILL)
    with alone(str(tmp_path), "run a"):
        pass


@pytest.mark.parametrize("locks", [True, False], ids=["object store", "file system without locks"])
def test_where_there_are_no_locks_a_name_in_the_cluster_is_one(
    ray_session: Any, moto_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    def without(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    uri = f"{moto_bucket}/alone/a" if locks else str(tmp_path)
    if not locks:
        monkeypatch.setattr(module.fcntl, "flock", without)
    for _ in range(2):  # at once again
        with alone(uri, "run a"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "LEAVES_S", 0.1)
            with alone(f"{uri}2" if locks else f"{moto_bucket}/alone/b", "another"):
                pass
            with pytest.raises(Unavailable, match="run a: another job is at work"), alone(uri, "run a"):
                pass


def test_a_run_or_a_campaign_that_is_at_work_is_not_gone_on_with(
    small_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does MLflow hear of the one that is refused: the run there is the other one's."""
    raw = small_run("prototypical", "name=begun")
    run = prepare(raw)[2]
    write_run(run)
    monkeypatch.setattr(workflow, "begin", lambda config, run, resumed: run)
    monkeypatch.setattr(workflow, "Tracker", None)
    with alone(run.uri, "run begun"), pytest.raises(Unavailable, match="run begun: another job is at work in"):
        workflow.train(compose("train", [f"resume={run.uri}"]))

    campaign = SimpleNamespace(
        name="small", uri=str(tmp_path), config=SimpleNamespace(tracking={}), train=SimpleNamespace(cluster=None)
    )

    monkeypatch.setattr(search, "begin", lambda raw: campaign)
    for name in ("check_tracking", "start_ray", "check_resources"):
        monkeypatch.setattr(search, name, lambda *_: None)
    with alone(str(tmp_path), "campaign small"), pytest.raises(Unavailable, match="campaign small: another job"):
        search.tune({})
