"""From the command to the first optimizer step."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from docs.studies.benchmark import made
from docs.studies.benchmark.rows import Bench, Finding, row

AGENT_PORT = 52365  # of Ray's agent on every node
OTHER = "beside another Ray on this machine"
ROOT = Path(__file__).resolve().parents[3]


def first_step(uri: str, storage: str) -> float:
    """Seconds until a job of one step says that it is done with it, which it does within half a second.

    The job runs to its end; MLflow's tracking is on, as it is by default.
    """
    path = Path(uri)
    arguments = [
        f"data.root={path.parent}", f"data.name={path.name}", f"storage={storage}/runs", f"name=start-{time.time_ns()}",
        f"tracking.uri=sqlite:///{storage}/mlflow.db", f"tracking.artifacts={storage}/mlartifacts", "steps=1",
        "log_every=1", "validation.episodes=1", "evaluation=null", "register_as=null",
    ]  # fmt: skip
    began = time.perf_counter()
    command = [sys.executable, "-m", "jobs.train", *arguments]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert job.stdout is not None
    found, lines = None, []
    for line in job.stdout:
        lines.append(line)
        if found is None and "step 1/1" in line:
            found = time.perf_counter() - began
    if job.wait() or found is None:
        raise RuntimeError(f"{' '.join(command)} ended with {job.returncode}:\n{''.join(lines[-20:])}")
    return found


@row("startup")
def startup(bench: Bench) -> Iterator[Finding]:
    """From the command to the first optimizer step."""
    uri = made.dataset(bench.folder, made.SMALL)
    first_step(uri, str(bench.folder))  # MLflow makes its database, the system reads files for the first time
    values = [first_step(uri, str(bench.folder)) for _ in range(min(3, bench.repetitions))]
    yield Finding(
        "from the command (python -m jobs.train, two workers, MLflow) to the first optimizer step, data ingested",
        values, "s", most=20, note=f"{OTHER}, whose agents' port this one tries for seconds" if another_ray() else "",
    )  # fmt: skip


def another_ray() -> bool:
    """Whether an agent of a Ray that was started before listens where this one's would: a start then takes seconds
    more, in which it tries that port again and again."""
    import ray

    try:
        socket.create_connection((ray.util.get_node_ip_address(), AGENT_PORT), timeout=1).close()
    except OSError:
        return False
    return True
