"""The jobs on a running cluster, as a user runs them: through ``ray job submit``."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.conftest import MARK, ROOT, RayHead, marked, running_head

pytestmark = pytest.mark.cluster

TRAIN = ["python", "-m", "jobs.train", "data=glyphs", "method=prototypical"]
JOIN = """
import sys
from pipeline.errors import PipelineError
from pipeline.ray_start import join
try:
    join(sys.argv[1], "cluster.address")
except PipelineError as error:
    print(error)
"""
SMALL = [
    "steps=4", "cluster.workers=1", "train.meta_batch_size=1", "validation.every=2", "validation.episodes=20",
    "evaluation=null", "tracking=none",
]  # fmt: skip


@pytest.mark.timeout(600)
def test_ingest_and_training_as_jobs(head: RayHead, tmp_path: Path) -> None:
    root = f"data.root={tmp_path}/datasets"
    done = head.submit("python", "-m", "jobs.ingest", "data=glyphs", root, "data.source.classes=60")
    assert done.returncode == 0 and "1,200 images of 60 classes" in done.stdout, done.stdout

    secret = secrets.token_hex(16)  # the job's own environment has what the training would pass on as well
    given = json.dumps({"env_vars": {"AWS_REGION": "us-west-2", "AWS_SECRET_ACCESS_KEY": secret}})

    def together(name: str) -> subprocess.CompletedProcess[str]:
        half = "cluster.cpus_per_worker=1.5"  # of the head: two of them leave no CPU for planning
        place = [root, f"storage={tmp_path}/runs", f"name={name}"]
        training = [*TRAIN, *SMALL, *place, "steps=40", "validation.every=20", half]
        return head.submit(*training, options=["--runtime-env-json", given])

    with ThreadPoolExecutor() as pool:
        for name, done in zip("ab", pool.map(together, "ab"), strict=True):
            assert secret not in done.stdout and "Traceback" not in done.stdout, done.stdout
            assert done.returncode == 0, done.stdout
            assert f"{name}  step 40/40" in done.stdout, "the log is followed to the end"
            run = tmp_path / "runs" / name
            assert json.loads((run / "run.json").read_text())["config"]["steps"] == 40
            state = json.loads((run / "step_00000040" / "state.json").read_text())
            assert state["step"] == 40 and "val/accuracy" in state["history"][-1]
            assert (run / "step_00000040" / "model.safetensors").stat().st_size > 0


def test_a_mistake_fails_the_job_with_its_one_line(head: RayHead, tmp_path: Path) -> None:
    done = head.submit(*TRAIN, *SMALL, "train.wey=5")
    assert done.returncode == 1
    assert "exit code 2" in done.stdout and "did you mean 'train.way'" in done.stdout, done.stdout
    assert "Traceback" not in done.stdout


def test_a_mistake_in_a_job_that_would_be_repeated_stops_it(head: RayHead, tmp_path: Path) -> None:
    script = str(ROOT / "infra" / "image" / "begin-or-resume")
    done = head.submit("sh", script, "train", "a-run", f"storage={tmp_path}/runs", "data=glyphs", "train.wey=5")
    assert "did you mean 'train.way'" in done.stdout and "this job is stopped" in done.stdout, done.stdout
    assert "was stopped" in done.stdout and "failed with exit code" not in done.stdout, done.stdout


def test_a_cluster_with_tokens_lets_only_their_holders_in(tmp_path: Path) -> None:
    token, guess = tmp_path / "token", tmp_path / "guess"
    for file in (token, guess):
        file.write_text(secrets.token_hex(32))
    list_upload = ("python", "-c", "import os, pipeline; print('uploaded:', pipeline.__file__, *os.listdir())")
    with running_head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token)) as head:
        for refused in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN_PATH": str(guess)}):
            done = head.submit(*list_upload, env=refused)
            assert done.returncode != 0, done.stdout
            assert "uploaded:" not in done.stdout
            assert "401" in done.stdout or "403" in done.stdout or "uthenticat" in done.stdout, done.stdout
        for refused in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN_PATH": str(guess)}):
            joined = [sys.executable, "-c", JOIN, head.gcs]
            done = subprocess.run(
                joined, cwd=ROOT, env=head.env | refused, text=True, capture_output=True, timeout=120, check=False
            )
            assert "this cluster asks for its token" in done.stdout, done.stdout + done.stderr
        done = head.submit(*list_upload)
    assert not marked(head.env[MARK]), "a stopped head leaves no process"
    assert done.returncode == 0, done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("uploaded:"))
    _, imported, *uploaded = line.split()
    assert not imported.startswith(str(ROOT)), "the job runs what was uploaded, not what happens to be installed"
    assert {"jobs", "pipeline"} <= set(uploaded)
    assert not {".git", ".venv", "datasets", "runs", "mlruns", "mlartifacts", "mlflow.db"} & set(uploaded)
