"""The jobs on a running cluster, as a user runs them: through ``ray job submit``."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from tests.cluster.conftest import MARK, ROOT, RayHead, marked, running_head

pytestmark = pytest.mark.cluster


def test_a_failed_job_fails_the_command(head: RayHead) -> None:
    done = head.submit("python", "-c", "raise SystemExit(3)")
    assert done.returncode == 1
    assert "failed with exit code 3" in done.stdout


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
        done = head.submit(*list_upload)
    assert not marked(head.env[MARK]), "a stopped head leaves no process"
    assert done.returncode == 0, done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("uploaded:"))
    _, imported, *uploaded = line.split()
    assert not imported.startswith(str(ROOT)), "the job runs what was uploaded, not what happens to be installed"
    assert {"jobs", "pipeline"} <= set(uploaded)
    assert not {".git", ".venv", "datasets", "runs", "mlruns", "mlartifacts", "mlflow.db"} & set(uploaded)
