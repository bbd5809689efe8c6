"""Private memory of a training worker, above that of a bare loop, and whether it grows with the dataset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from docs.studies.benchmark import made
from docs.studies.benchmark.apart import Apart
from docs.studies.benchmark.rows import Bench, Finding, row
from docs.studies.benchmark.runs import TASKS, bare_memory, trained

LARGER = 8  # times as many images
MB = 2**20


@row("memory", needs_ray=True)
def worker_memory(bench: Bench) -> Iterator[Finding]:
    """Peak memory of a worker above the bare loop's."""
    small = made.dataset(bench.folder, made.SMALL)
    large = made.dataset(
        bench.folder, replace(made.SMALL, name=f"{made.SMALL.name}_larger", images=made.SMALL.images * LARGER)
    )
    above, growth, sides = [], [], {"worker": [], "bare loop": [], f"worker, {LARGER} x the images": []}  # type: ignore[var-annotated]
    steps = bench.count(100, 5)
    for _ in range(min(3, bench.repetitions)):
        with Apart(bare_memory, small, TASKS // 2, steps) as alone:
            bare = alone() / MB
        of_small, of_large = (trained(bench, uri, 2, steps).memory / MB for uri in (small, large))
        above.append(of_small - bare)
        growth.append(of_large - of_small)
        for name, value in zip(sides, (of_small, bare, of_large), strict=True):
            sides[name].append(value)
    yield Finding(
        "peak private memory of a worker above the bare loop's", above, "MB", most=300, sides=sides, measure="MB"
    )
    yield Finding(f"growth of that with {LARGER} times the images", growth, "MB", most=10)
