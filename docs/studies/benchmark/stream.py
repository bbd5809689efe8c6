"""Episodes through Ray Data to two consumers, against reading them in one process or with PyTorch's loader."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from docs.studies.benchmark import made
from docs.studies.benchmark.apart import Apart
from docs.studies.benchmark.rows import Bench, Finding, ratio, row
from docs.studies.benchmark.timing import Sides, interleaved
from docs.studies.benchmark.usage import cpu_seconds
from pipeline.batch import Batch
from pipeline.data.batches import local_batches, read_batch
from pipeline.data.dataset import Dataset
from pipeline.data.planners import EpisodePlanner
from pipeline.data.stream import Stream

CONSUMERS = 2
TASKS = 8  # episodes a step and consumer
STEPS = {made.SMALL: 12000, made.LARGE: 800}  # of each consumer in a repetition: five to twenty seconds


class Streamed:
    """Consumers of one stream: actors that do nothing with the batches they are given."""

    def __init__(self, uri: str, steps: int, consumers: int = CONSUMERS, tasks: int = TASKS) -> None:
        shared = made.planner(uri, tasks * consumers)
        self._steps, self._tasks = steps, tasks
        make: Any = _Consumer
        self._actors = [make.remote(uri, shared, steps, rank, consumers) for rank in range(consumers)]

    def rate(self) -> float:
        """Episodes a second of all consumers, from their first batch to their last."""
        ray.get([actor.begin.remote() for actor in self._actors])
        began = time.perf_counter()
        ray.get([actor.finish.remote() for actor in self._actors])
        return self._steps * self._tasks * len(self._actors) / (time.perf_counter() - began)

    def cpu(self) -> float:
        """CPU milliseconds an episode, of this process and all of Ray that it started."""
        ray.get([actor.begin.remote() for actor in self._actors])
        began = cpu_seconds()
        ray.get([actor.finish.remote() for actor in self._actors])
        return 1e3 * (cpu_seconds() - began) / (self._steps * self._tasks * len(self._actors))

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)


@ray.remote(num_cpus=1)
class _Consumer:
    def __init__(self, uri: str, planner: EpisodePlanner, steps: int, rank: int, world_size: int) -> None:
        torch.set_num_threads(1)
        self._made = (Dataset(uri, verify=False), planner, 0, steps + 1, rank, world_size)
        self._batches: Iterator[Any] = iter(())

    def begin(self) -> None:
        self._batches = iter(Stream(*self._made))
        next(self._batches)

    def finish(self) -> None:
        for _ in self._batches:
            pass


def gathered(uri: str, count: int) -> Iterator[float]:
    """Episodes a second of a plain loop: draw the plans of a step, gather its pixels, make the batch."""
    dataset, planner = Dataset(uri, verify=False), made.planner(uri, TASKS)
    first = 0
    while True:
        began = time.perf_counter()
        for _ in local_batches(dataset, planner, first, count):
            pass
        yield count * TASKS / (time.perf_counter() - began)
        first += count


def copied(uri: str, count: int) -> Iterator[float]:
    """Episodes a second of the copy alone: plans are drawn beforehand, and one buffer is used for all."""
    dataset, planner = Dataset(uri, verify=False), made.planner(uri, TASKS)
    plans = planner.plans(0, min(count, 64), 0, 1)
    buffer = np.empty((plans[0].rows.size, *dataset.shape), dtype=np.uint8)
    while True:
        began = time.perf_counter()
        for number in range(count):
            dataset.gather(plans[number % len(plans)].rows, out=buffer)
        yield count * TASKS / (time.perf_counter() - began)


class _Steps(TorchDataset[Batch]):
    """What one would hand to PyTorch's loader: step by number."""

    def __init__(self, uri: str) -> None:
        self._dataset, self._planner = Dataset(uri, verify=False), made.planner(uri, TASKS)

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, step: int) -> Batch:
        plan = self._planner.plan(step)
        return read_batch(self._dataset, plan)


def loaded(uri: str, count: int, workers: int = 2) -> Iterator[float]:
    """CPU milliseconds an episode of PyTorch's loader, of this process and its workers."""
    batches = iter(DataLoader(_Steps(uri), batch_size=None, sampler=range(10**9), num_workers=workers))
    for _ in range(8):
        next(batches)
    while True:
        began = cpu_seconds()
        for _ in range(count):
            next(batches)
        yield 1e3 * (cpu_seconds() - began) / (count * TASKS)


def _against_gather(bench: Bench, pixels: made.Pixels, least: float) -> Iterator[Finding]:
    uri, steps = made.dataset(bench.folder, pixels), bench.count(STEPS[pixels], 20)
    size = "x".join(map(str, pixels.shape[1:])) + ("x3" if pixels.shape[0] == 3 else "")
    with Streamed(uri, steps) as streamed, Apart(gathered, uri, steps) as gather, Apart(copied, uri, steps) as copy:
        sides: Sides = {"Ray Data, two consumers": streamed.rate, "gather": gather, "copy alone": copy}
        found = interleaved(sides, bench.repetitions)
    names = list(sides)
    yield ratio(
        f"episode stream, {size} 5-way 1-shot 15-query, against an in-process gather on one core",
        found, (names[0], names[1]), "episodes/s", least=least,
        note="the gather draws plans, copies pixels and makes batches; a copy alone has its plans and one buffer",
    )  # fmt: skip


@row("stream", needs_ray=True)
def stream_28(bench: Bench) -> Iterator[Finding]:
    """Episode stream at 28x28 against an in-process gather."""
    yield from _against_gather(bench, made.SMALL, 0.85)


@row("stream", needs_ray=True)
def stream_84(bench: Bench) -> Iterator[Finding]:
    """Episode stream at 84x84x3 against an in-process gather."""
    yield from _against_gather(bench, made.LARGE, 1.3)


@row("stream", needs_ray=True)
def stream_cpu(bench: Bench) -> Iterator[Finding]:
    """CPU time an episode against PyTorch's loader."""
    uri, steps = made.dataset(bench.folder, made.LARGE), bench.count(STEPS[made.LARGE], 20)
    with Streamed(uri, steps) as streamed, Apart(loaded, uri, steps) as loader:
        sides: Sides = {"Ray Data, two consumers": streamed.cpu, "DataLoader, two workers": loader}
        found = interleaved(sides, bench.repetitions)
    names = list(sides)
    yield ratio(
        "CPU an episode, 84x84x3, of all processes, against PyTorch's loader on the same shards",
        found, (names[0], names[1]), "CPU ms/episode", most=0.5,
    )  # fmt: skip
