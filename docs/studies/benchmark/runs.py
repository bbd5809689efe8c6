"""Training runs of the pipeline, and the bare PyTorch loops that they are held against."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from docs.studies.benchmark import made
from docs.studies.benchmark.rows import Bench
from docs.studies.benchmark.usage import Peak, training_workers
from pipeline.batch import Episodes
from pipeline.config import compose
from pipeline.data.batches import local_batches
from pipeline.data.dataset import Dataset
from pipeline.training.cluster import start_ray
from pipeline.training.launch import launch
from pipeline.training.prepare import prepare

TASKS = 2  # episodes a step, over all workers
WINDOWS = 12  # log lines in a run; the first two are not counted


@dataclass(frozen=True)
class Trained:
    seconds: float  # a step, in steady state
    wait_share: float
    memory: int  # bytes, of the largest worker


def trained(bench: Bench, uri: str, workers: int, steps: int, *more: str) -> Trained:
    """A run under Ray Train with everything on: the stream, DDP, logging, and a checkpoint every 500 steps.

    ``more``: keys of its configuration, beside those that all such runs have.

    Its own log tells the time of a step; what comes before the third log line is not counted.
    """
    window = max(1, steps // WINDOWS)
    entries: list[dict[str, float]] = []
    with Peak(training_workers) as peak, contextlib.redirect_stdout(None):
        config, _, run = prepare(compose("train", [*_overrides(bench, uri, workers, steps, window), *more]))
        start_ray(bench.cluster)
        launch(config, run, entries.append)
    lines = [e for e in entries if "train/steps_per_s" in e]
    steady = [e for e in lines if e["step"] > 2 * window] or lines
    times = [1 / e["train/steps_per_s"] for e in steady]
    shares = [e["train/wait_share"] for e in steady]
    mean = sum(times) / len(times)
    waited = sum(share * t for share, t in zip(shares, times, strict=True)) / sum(times)
    return Trained(mean, waited, peak.most)


def _overrides(bench: Bench, uri: str, workers: int, steps: int, window: int) -> list[str]:
    path, cluster = Path(uri), bench.cluster
    return [
        f"data.root={path.parent}",
        f"data.name={path.name}",
        f"storage={bench.folder / 'runs'}",
        f"name=benchmark-{time.time_ns()}",
        f"steps={steps}",
        f"train.meta_batch_size={TASKS}",
        f"log_every={window}",
        f"checkpoint.every={bench.count(500, 2)}",
        f"validation.every={steps}",
        "validation.episodes=2",
        "evaluation=null",
        "register_as=null",
        "tracking=none",
        f"cluster.workers={workers}",
        f"cluster.cpus_per_worker={cluster.cpus_per_worker}",
        f"cluster.gpus_per_worker={cluster.gpus_per_worker}",
        f"cluster.threads_per_worker={cluster.threads_per_worker or 'null'}",
    ]


class BareLoop:
    """The same model, optimizer and episodes in plain PyTorch: float images that are there already."""

    def __init__(self, uri: str, tasks: int) -> None:
        dataset = Dataset(uri, verify=False)
        planner = made.planner(uri, tasks)
        self._method = made.model("prototypical", dataset.shape, way=5)
        self._optimizer = torch.optim.Adam(self._method.parameters(), lr=1e-3)
        self._batches = [_floats(batch) for _, batch in local_batches(dataset, planner, 0, 4)]
        self._turn = 0

    def step(self) -> None:
        loss, _ = self._method(self._batches[self._turn % len(self._batches)])
        self._turn += 1
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()


def bare_loop(uri: str, tasks: int, steps: int) -> Iterator[float]:
    """Seconds a step."""
    loop = BareLoop(uri, tasks)
    while True:
        began = time.perf_counter()
        for _ in range(steps):
            loop.step()
        yield (time.perf_counter() - began) / steps


def bare_memory(uri: str, tasks: int, steps: int) -> Iterator[int]:
    """Bytes of private memory at the peak."""
    with Peak(lambda: [psutil.Process()]) as peak:
        loop = BareLoop(uri, tasks)
        for _ in range(steps):
            loop.step()
        time.sleep(0.1)
    while True:
        yield peak.most


def _floats(batch: Any) -> Episodes:
    assert isinstance(batch, Episodes)
    return Episodes(
        batch.support.float() / 255, batch.support_labels, batch.query.float() / 255, batch.query_labels,
        batch.classes, batch.way,
    )  # fmt: skip


def forward_backward(network: nn.Module, images: torch.Tensor) -> None:
    """What a training step cannot do without."""
    network.zero_grad(set_to_none=True)
    network(images).square().mean().backward()
