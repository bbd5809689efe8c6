"""Whether the memory of the actors that embed grows with what they have embedded."""

from __future__ import annotations

import os
import statistics
import threading
from collections.abc import Iterator
from dataclasses import replace

import psutil

from docs.studies.benchmark import made
from docs.studies.benchmark.features import embedding
from docs.studies.benchmark.rows import Bench, Finding, row
from docs.studies.benchmark.usage import private_bytes
from pipeline.data.augment import Augmentation
from pipeline.data.write import Target
from pipeline.evaluation.embed_dataset import Embedder, embed_dataset

MB = 2**20
INTERVAL = 0.2  # seconds between two looks at memory


@row("features", needs_ray=True)
def features_memory(bench: Bench) -> Iterator[Finding]:
    """Growth of the private memory of jobs.embed's actors from the first third of a run to its last."""
    how = embedding(made.dataset(bench.folder, made.LARGE))
    grown, sides = [], {"first third": [], "last third": []}  # type: ignore[var-annotated]
    views = max(0, bench.count(4, 0) - 1)
    how = replace(how, views=views, augmentation=Augmentation(flip=views > 0))
    for number in range(min(3, bench.repetitions)):
        place = bench.folder / "datasets" / f"features_memory_{number}"
        target = Target(str(place), overwrite=True, resume=True)
        with Watch(target.place) as watch:
            embed_dataset(how, target, place.name, {"kind": "features"}, say=lambda line: None)
        first, last = watch.thirds()
        grown.append(last - first)
        sides["first third"].append(first)
        sides["last third"].append(last)
    yield Finding(
        f"private memory of an actor of jobs.embed, last third of a run over {10_000 * (1 + views):,} images of 84x84 "
        "less its first third", grown, "MB", most=20, sides=sides, measure="MB",
    )  # fmt: skip


class Watch:
    """Private memory, over time, of the largest actor that embeds, from its first written shard on."""

    def __init__(self, place: str) -> None:
        self.seen: list[float] = []  # MB
        self._place, self._stop = place, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def thirds(self) -> tuple[float, float]:
        """Medians of the first third and of the last."""
        part = max(1, len(self.seen) // 3)
        return statistics.median(self.seen[:part]), statistics.median(self.seen[-part:])

    def _look(self) -> None:
        while not self._stop.wait(INTERVAL):
            if not os.path.isdir(self._place) or not any(f.startswith("part-") for f in os.listdir(self._place)):
                continue
            found = []
            for process in psutil.Process().children(recursive=True):
                try:
                    if Embedder.__name__ in " ".join(process.cmdline()):
                        found.append(private_bytes(process) / MB)
                except psutil.Error:
                    continue
            if found:
                self.seen.append(max(found))
