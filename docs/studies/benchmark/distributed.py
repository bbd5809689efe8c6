"""The whole pipeline under Ray Train, against bare loops and against itself on fewer workers."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from docs.studies.benchmark import made
from docs.studies.benchmark.apart import Apart, Together
from docs.studies.benchmark.rows import Bench, Finding, NotHere, Times, ratio, row
from docs.studies.benchmark.runs import TASKS, bare_loop, trained
from docs.studies.benchmark.timing import Sides

TWO, ONE = "pipeline, two workers", "pipeline, one worker"
BARE_TWO, BARE_ONE, BARE_APART = "bare loop, two threads", "bare loop, one thread", "two bare loops, half each"
REPETITIONS = 3  # at most: a run takes a minute
EPISODES = "prototypical, Conv-4-64, 28x28 5-way 1-shot 15-query"


@functools.lru_cache(maxsize=1)
def _sides(bench: Bench) -> tuple[Times, list[float]]:
    """Milliseconds a step of every side, and the shares of waiting; bare loops run before and after each run."""
    if bench.cluster.workers != 2 or bench.cluster.gpus_per_worker or bench.cluster.threads_per_worker != 1:
        raise NotHere("compares two CPU workers of one thread each with one: cluster=local")
    uri = made.dataset(bench.folder, made.SMALL)
    steps, short = bench.count(600, 12), bench.count(40, 4)
    found: Times = {name: [] for name in (TWO, ONE, BARE_TWO, BARE_ONE, BARE_APART)}
    waits = []
    with (
        Apart(bare_loop, uri, TASKS, short, threads=2) as two,
        Apart(bare_loop, uri, TASKS, short) as one,
        Apart(bare_loop, uri, TASKS // 2, short) as left,
        Apart(bare_loop, uri, TASKS // 2, short) as right,
    ):
        bare: Sides = {BARE_TWO: two, BARE_ONE: one, BARE_APART: Together([left, right])}
        for side in bare.values():
            side()
        for _ in range(min(REPETITIONS, bench.repetitions)):
            around = [{name: side() for name, side in bare.items()}]
            run = trained(bench, uri, 2, steps)
            around.append({name: side() for name, side in bare.items()})
            alone = trained(bench, uri, 1, steps // 2)
            around.append({name: side() for name, side in bare.items()})
            waits.append(100 * run.wait_share)
            found[TWO].append(1e3 * run.seconds)
            found[ONE].append(1e3 * alone.seconds)
            for name in bare:
                found[name].append(1e3 * sum(r[name] for r in around) / len(around))
    return found, waits


def _of(found: Times, *names: str) -> Times:
    return {name: found[name] for name in names}


@row("pipeline", needs_ray=True)
def wait_share(bench: Bench) -> Iterator[Finding]:
    """Share of a training step that waits for data."""
    _, waits = _sides(bench)
    yield Finding(f"waiting for data, share of a training step ({EPISODES}, two workers)", waits, "%", most=2)


@row("pipeline", needs_ray=True)
def steady_state(bench: Bench) -> Iterator[Finding]:
    """Time of a step of the whole pipeline against the bare PyTorch loop."""
    found, _ = _sides(bench)
    what = f"a step of the whole pipeline ({EPISODES})"
    yield ratio(
        f"{what} on two workers, against the bare PyTorch loop on two threads", _of(found, TWO, BARE_TWO),
        (TWO, BARE_TWO), "ms", most=1.05,
    )  # fmt: skip
    yield ratio(
        f"{what} on one worker, against the bare PyTorch loop on one thread", _of(found, ONE, BARE_ONE),
        (ONE, BARE_ONE), "ms", most=1.05,
    )  # fmt: skip
    yield ratio(
        f"{what} on two workers, against two bare loops at once that share nothing", _of(found, TWO, BARE_APART),
        (TWO, BARE_APART), "ms",
    )  # fmt: skip


@row("pipeline", needs_ray=True)
def two_workers(bench: Bench) -> Iterator[Finding]:
    """Speed on two workers with one core each against one worker with one core."""
    found, _ = _sides(bench)
    yield ratio(
        "speed of DDP on two workers with one core each, against one worker with one core", _of(found, ONE, TWO),
        (ONE, TWO), "ms", least=1.85,
    )  # fmt: skip
    yield ratio(
        "the machine's own limit of that: two bare loops at once against one", _of(found, BARE_ONE, BARE_APART),
        (BARE_ONE, BARE_APART), "ms",
    )  # fmt: skip
