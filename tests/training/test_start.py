"""What a run waits for: no import that only its end needs, and no dashboard that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LEAN = """
import sys
from pipeline import workflow
from pipeline.config import compose
from pipeline.training.runs import claim_run

def stop(*arguments):
    sys.exit(", ".join(sorted({"mlflow", "scipy", "matplotlib", "torch._dynamo"} & set(sys.modules))))

workflow.begin = lambda config, run, resumed: claim_run(run, named=False)  # without Ray
workflow.launch = stop
workflow.train(compose("train", sys.argv[1:]))
"""


def test_a_run_is_launched_before_what_only_its_end_needs_is_imported(glyphs: str, tmp_path: Path) -> None:
    root, name = os.path.split(glyphs)
    place = [f"data.root={root}", f"data.name={name}", f"storage={tmp_path}", f"tracking.uri=sqlite:///{tmp_path}/t.db"]
    done = subprocess.run([sys.executable, "-c", LEAN, *place], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, "\n"), done.stdout + done.stderr


def test_nobody_looks_long_for_a_dashboard_that_is_not_there(ray_session) -> None:
    """Ray Train does at the end of every run; without the variable it looks for 12 s."""

    @ray_session.remote
    def refused() -> float:
        from ray.util.state import get_actor

        began = time.monotonic()
        with pytest.raises(Exception, match="Failed to make request"):
            get_actor("0" * 32)
        return time.monotonic() - began

    assert ray_session.get(refused.remote()) < 5
