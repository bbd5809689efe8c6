"""One job at a time in a folder, and nothing left behind by one that was killed."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import workflow
from pipeline.config import compose
from pipeline.errors import PipelineError, Unavailable
from pipeline.training import alone as module
from pipeline.training.alone import alone
from pipeline.training.prepare import prepare
from pipeline.training.runs import write_run

HOLDS = """
import sys, time
from pipeline.training.alone import alone
with alone(sys.argv[1], "run first"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_free_again_when_its_job_was_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with (
        pytest.raises(Unavailable, match=f"run mine: another job is at work in {tmp_path}"),
        alone(str(tmp_path), "run mine"),
    ):
        pass
    holder.kill()
    holder.wait()
    with alone(str(tmp_path), "run mine"):
        pass
    with alone(str(tmp_path), "run mine"):  # and when it ended
        pass


def test_a_run_that_trains_is_not_resumed_beside_it(small_run, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = small_run("prototypical", "name=mine")
    _, _, run = prepare(raw)
    write_run(run)

    def launch(*_: object) -> None:
        raise PipelineError("it trains")

    monkeypatch.setattr(workflow, "launch", launch)
    monkeypatch.setattr(workflow, "begin", lambda config, run, resumed: run)
    again = ["resume=mine", f"storage={raw['storage']}"]
    with alone(run.uri, "run mine"), pytest.raises(Unavailable, match="run mine: another job is at work"):
        workflow.train(compose("train", again))
    with pytest.raises(PipelineError, match="it trains"):
        workflow.train(compose("train", again))


def test_of_two_jobs_of_a_cluster_one_is_in_a_folder_of_a_bucket(ray_session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAVES_S", 1.0)
    with alone("s3://bucket/runs/mine", "run mine"):
        with alone("s3://bucket/runs/other", "run other"):
            pass
        with pytest.raises(Unavailable, match="run mine"), alone("s3://bucket/runs/mine", "run mine"):
            pass
    with alone("s3://bucket/runs/mine", "run mine"):
        pass
