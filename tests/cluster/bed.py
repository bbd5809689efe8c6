"""What every fault is tried on: nodes, a store, a dataset in it, and an untouched run to compare with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Config, compose
from pipeline.data import store
from pipeline.training.checkpoint import Checkpoint, load_checkpoint
from pipeline.training.launch import launch, prepare
from pipeline.training.runs import Run, checkpoints
from tests.cluster.consumed import Group, check_once, planned, read_groups
from tests.cluster.nodes import BUCKET, WORKER_CPUS, Nodes, ObjectStore

STEPS, TASKS = 40, 4
SMALL = [
    "method=prototypical", "method.name=tests.cluster.recorded.Recorded", f"steps={STEPS}", "log_every=5", "seed=3",
    "train.way=5", "train.shot=1", "train.query=3", f"train.tasks={TASKS}", "backbone.width=8",
    "validation.every=20", "validation.episodes=8", "validation.query=5", "validation.tasks=2",
    "checkpoint.every=10", "checkpoint.keep=9", "evaluation=null", "register_as=null", "tracking=none",
    f"cluster.cpus_per_worker={WORKER_CPUS}",
]  # fmt: skip


@dataclass
class Bed:
    nodes: Nodes
    store: ObjectStore
    datasets: str  # the local folder that the store's dataset was copied from
    notes: Path  # where the probes of the tests write
    references: dict[int, tuple[Checkpoint, float]] = field(default_factory=dict)
    plan: dict[str, int] = field(default_factory=dict)

    def config(self, name: str, *overrides: str) -> Config:
        """A run of this name, from the store and to the store."""
        notes = self.notes / name
        notes.mkdir(exist_ok=True)
        place = [f"data.root=s3://{BUCKET}/datasets", "data.name=glyphs", f"storage=s3://{BUCKET}/runs"]
        return compose("train", [*SMALL, *place, f"name={name}", f"+method.notes={notes}", *overrides])

    def train(self, name: str, *overrides: str) -> tuple[Run, float]:
        """Train to the end in this process' cluster; the run and its seconds."""
        config, _, run = prepare(self.config(name, *overrides))
        began = time.monotonic()
        launch(config, run)
        return run, time.monotonic() - began

    def reference(self, workers: int = 2) -> tuple[Checkpoint, float]:
        """The last checkpoint of an untouched run, and its seconds; trained once."""
        if workers not in self.references:
            run, seconds = self.train(f"untouched{workers}", f"cluster.workers={workers}")
            groups = self.groups(run.name)
            assert len(groups) == 1
            check_once(groups, STEPS, TASKS)
            self.references[workers] = final(run), seconds
        return self.references[workers]

    def groups(self, name: str) -> list[Group]:
        if not self.plan:
            self.plan = planned(self.config("plan"), self.datasets)
        return read_groups(self.notes / name, self.plan, TASKS)

    def check(self, run: Run, workers: int = 2, starts: int = 2) -> float:
        """The run ended with the untouched run's bits, from every episode once a step; the untouched run's seconds."""
        groups = self.groups(run.name)
        check_once(groups, STEPS, TASKS)
        assert len(groups) == starts, f"the worker group was started {len(groups)} times, not {starts}"
        whole, seconds = self.reference(workers)
        assert_same(whole, final(run))
        return seconds


def final(run: Run) -> Checkpoint:
    return load_checkpoint(checkpoints(run.uri)[-1])


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    """Equal weights and moments, bit for bit."""
    assert a.step == b.step
    for part in ("model", "optimizer"):
        x, y = getattr(a, part), getattr(b, part)
        assert x.keys() == y.keys()
        for name in x:
            assert torch.equal(x[name], y[name]), name


def meanwhile(action: Callable[[], Any]) -> Meanwhile:
    """Do something beside the training; ``done`` waits for it, and raises what went wrong in it."""
    return Meanwhile(action)


class Meanwhile:
    def __init__(self, action: Callable[[], Any]) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(action,), daemon=True)
        self._thread.start()

    def _run(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except BaseException as error:
            self._error = error

    def done(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive(), "the fault never came"
        if self._error:
            raise self._error


def fill_store(datasets: str) -> None:
    """Copy the local dataset to the object store."""
    for name in store.list_names(f"{datasets}/glyphs"):
        store.write_bytes(f"s3://{BUCKET}/datasets/glyphs/{name}", store.read_bytes(f"{datasets}/glyphs/{name}"))
