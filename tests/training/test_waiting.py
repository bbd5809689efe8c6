"""A run whose workers find no place says so, and ends when it is asked to: nobody kills it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FULL = """
import sys
import ray
from jobs._main import run
from pipeline.ray_start import start_here
from pipeline.training import telemetry
from pipeline.workflow import train

telemetry.WAIT_SECONDS = 1.0
start_here(1, 100)

@ray.remote(num_cpus=1)
class Other:
    def ready(self):
        return True

other = Other.remote()
ray.get(other.ready.remote())
run("train", train, sys.argv[1:])
"""


def test_a_run_without_a_place_says_what_it_waits_for_and_ends_when_asked(glyphs: str, tmp_path: Path) -> None:
    folder, name = os.path.split(glyphs)
    given = [
        f"data.name={name}", f"data.root={folder}", f"storage={tmp_path}", "name=waiting", "tracking=none",
        "cluster.workers=1",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", FULL, *given], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        said, waits = "", "waits for its workers, which need 1 CPUs (0 of 1 are free)"
        for line in process.stdout:
            if waits in line and waits not in said:  # a second signal would end it at once
                process.send_signal(signal.SIGTERM)
            said += line
        assert process.wait(60) == 143, said
    finally:
        process.kill()
    [last] = [line for line in said.splitlines() if "as asked" in line]
    assert last.endswith(f"go on with it: python -m jobs.train resume={tmp_path}/waiting") and "Traceback" not in said
