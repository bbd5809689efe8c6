"""The jobs from any folder: also one that has a package ``jobs`` of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "from jobs._main import main; main()"  # what an installed console script runs; it has no working directory


@pytest.fixture
def own_jobs(tmp_path: Path) -> Path:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("raise SystemExit('the jobs of somebody else')")
    return tmp_path


def command(*arguments: str, where: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, *arguments], cwd=where, env=environment, text=True, capture_output=True
    )


def test_the_console_script_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["scripts"]["meta-training"].split(":")
    assert callable(getattr(import_module(module), name))


def test_a_folder_named_jobs_does_not_take_the_place_of_ours(own_jobs: Path) -> None:
    usual = [sys.executable, "-m", "jobs.ingest", "--help"]
    shadowed = subprocess.run(usual, cwd=own_jobs, capture_output=True, text=True)
    assert "somebody else" in shadowed.stderr  # what the command is for
    done = command("ingest", "--help", where=own_jobs)
    assert done.returncode == 0 and done.stdout.startswith("python -m jobs.ingest [key=value ...]"), done.stderr
    refused = command("ingest", "data=nothing", where=own_jobs)
    assert refused.returncode == 2 and "there is no such data" in refused.stderr


def test_the_demonstration_runs_our_jobs(own_jobs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.demo import run_job
    from pipeline.errors import PipelineError

    monkeypatch.chdir(own_jobs)
    with pytest.raises(PipelineError, match="status 2"):  # ours, which refuses the argument
        run_job("ingest", "data=nothing")


def test_a_job_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = command("trian", where=tmp_path)
    assert done.returncode == 2 and "there is no job 'trian'" in done.stderr and "train" in done.stderr
    helped = command(where=tmp_path)
    assert helped.returncode == 0 and "one of benchmark, classify" in helped.stdout
