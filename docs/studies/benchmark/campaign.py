"""How many candidates a campaign gets through in an hour."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from pathlib import Path

from docs.studies.benchmark import made
from docs.studies.benchmark.rows import Bench, Finding, ratio, row
from docs.studies.benchmark.timing import interleaved
from pipeline.config import compose
from pipeline.search.arguments import translate
from pipeline.search.run import tune

CANDIDATES = 6
APART, TOGETHER = "one trial a process", "together"


def candidates_an_hour(bench: Bench, uri: str, together: int, steps: int) -> float:
    """Of the metric scale's campaign, on the cluster that is there already, without finalists."""
    path, cluster = Path(uri), bench.cluster
    arguments = [
        "campaign=metric_scale", "fix.method=prototypical", "fix.method.distance=cosine",
        f"trials={CANDIDATES}", f"together={together}", "scheduler.kind=none", "finalists.count=0",
        "objective.way=5", "objective.query=5", "objective.episodes=40",
        f"base.steps={steps}", f"base.validation.every={steps}", "base.train.way=5", "base.train.tasks=1",
        f"base.data.root={path.parent}", f"base.data.name={path.name}", "base.cluster.workers=1",
        f"base.cluster.cpus_per_worker={cluster.cpus_per_worker}",
        f"base.cluster.gpus_per_worker={cluster.gpus_per_worker}",
        f"base.cluster.threads_per_worker={cluster.threads_per_worker or 'null'}",
        f"storage={bench.folder / 'campaigns'}", f"name=benchmark-{time.time_ns()}", "tracking=none",
    ]  # fmt: skip
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        found = tune(compose("tune", translate(arguments)))
    if found["finished"] != CANDIDATES:
        raise RuntimeError(f"{found['finished']} of {CANDIDATES} trials finished:\n{said.getvalue()}")
    return 3600 * CANDIDATES / (time.perf_counter() - began)


@row("campaign", needs_ray=True)
def candidates(bench: Bench) -> Iterator[Finding]:
    """Candidates an hour of a campaign whose trials share a process, against one trial a process."""
    uri = made.dataset(bench.folder, made.SMALL)
    for steps in (bench.count(100), bench.count(300)):
        sides = {
            APART: lambda steps=steps: candidates_an_hour(bench, uri, 1, steps),
            TOGETHER: lambda steps=steps: candidates_an_hour(bench, uri, CANDIDATES // 2, steps),
        }
        found = interleaved(sides, min(2, bench.repetitions), warm_up=0)
        yield ratio(
            f"candidates an hour of a campaign, {steps:,} steps each (prototypical, 5-way 1-shot, Conv-4-64): "
            f"{CANDIDATES // 2} in a process, against one trial a process",
            found, (TOGETHER, APART), "candidates/h",
        )  # fmt: skip
