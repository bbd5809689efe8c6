"""What every fault is tried on: nodes, a store, a dataset in it, and an untouched run to compare with."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline import store
from pipeline.config import Config, compose
from pipeline.training.checkpoint import Checkpoint, load_checkpoint
from pipeline.training.launch import launch
from pipeline.training.prepare import prepare
from pipeline.training.runs import Run, checkpoints
from tests.cluster.consumed import Group, check_once, planned, read_groups
from tests.cluster.nodes import BUCKET, WORKER_CPUS, Nodes, ObjectStore, workers_of

STEPS, TASKS = 40, 4
SMALL = [
    "method=prototypical", "method.name=tests.cluster.recorded.Recorded", f"steps={STEPS}", "log_every=5", "seed=3",
    "train.way=5", "train.shot=1", "train.query=3", f"train.meta_batch_size={TASKS}", "backbone.width=8",
    "validation.every=20", "validation.episodes=8", "validation.query=5", "validation.tasks=2",
    "checkpoint.every=10", "checkpoint.keep=9", "evaluation=null", "register_as=null", "tracking=none",
    f"cluster.cpus_per_worker={WORKER_CPUS}",
]  # fmt: skip
SELDOM = ["checkpoint.every=1000", "validation.every=1000", "+method.pause=0.3"]  # no checkpoint but at the end


@dataclass
class Bed:
    nodes: Nodes
    store: ObjectStore
    datasets: str  # the local folder that the store's dataset was copied from
    notes: Path  # where the probes of the tests write
    references: dict[int, tuple[Checkpoint, float]] = field(default_factory=dict)
    plan: dict[str, int] = field(default_factory=dict)

    def overrides(self, name: str, *more: str) -> list[str]:
        """The arguments of a run of this name, from the store and to the store."""
        notes = self.notes / name
        notes.mkdir(exist_ok=True)
        place = [f"data.root=s3://{BUCKET}/datasets", "data.name=glyphs", f"storage=s3://{BUCKET}/runs"]
        return _last_of_each([*SMALL, *place, f"name={name}", f"+method.notes={notes}", *more])

    def config(self, name: str, *overrides: str) -> Config:
        return compose("train", self.overrides(name, *overrides))

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

    def episodes(self) -> dict[str, int]:
        """Every episode of the plan: digest -> number."""
        if not self.plan:
            self.plan = planned(self.config("plan"), self.datasets)
        return self.plan

    def groups(self, name: str) -> list[Group]:
        return read_groups(self.notes / name, self.episodes(), TASKS)

    def notes_of(self, name: str) -> list[tuple[int, list[dict[str, Any]]]]:
        """What every process of the run has noted so far, latest process last: its id and its lines."""
        found = []
        for file in (self.notes / name).glob("*.jsonl"):
            lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
            if lines:
                found.append((int(file.stem.rpartition("-")[2]), lines))
        return sorted(found, key=lambda item: item[1][0]["time"])

    def taken(self, name: str) -> int:
        """The most training batches that one process has been given."""
        return max((len(lines) for _, lines in self.notes_of(name)), default=0)

    def starts(self, name: str) -> set[str]:
        """The starts of the worker group that came to training."""
        return {lines[0]["group"] for _, lines in self.notes_of(name)}

    def pid(self, name: str, rank: int) -> int:
        """The latest process of a rank."""
        return [pid for pid, lines in self.notes_of(name) if lines[0]["rank"] == rank][-1]

    def node_of(self, name: str, rank: int) -> Any:
        """The node on which the latest process of a rank runs."""
        pid = self.pid(name, rank)
        return next(node for node in self.nodes.nodes if pid in {worker.pid for worker in workers_of(node)})

    def noticed(self, name: str) -> list[int]:
        """Steps with a checkpoint of a run with ``SELDOM``, whose only other one is the last."""
        steps = [int(uri.rpartition("_")[2]) for uri in checkpoints(f"s3://{BUCKET}/runs/{name}")]
        return [step for step in steps if step != STEPS]

    def committed(self, name: str, step: int) -> bool:
        """Whether Ray Train would go on from this step's checkpoint: it has noted it in the store."""
        snapshot = f"s3://{BUCKET}/runs/{name}/checkpoint_manager_snapshot.json"
        return store.exists(snapshot) and f"step_{step:08d}".encode() in store.read_bytes(snapshot)

    def cached_shards(self) -> list[Path]:
        return [path for path in self.nodes.folder.glob("*/cache/*/shard-*.arrow")]

    def forget_shards(self) -> None:
        for shard in self.cached_shards():
            shard.unlink()

    def check(self, run: Run, workers: int = 2, starts: int = 2) -> float:
        """The run ended with the untouched run's bits, from every episode once a step; the untouched run's seconds."""
        groups = self.groups(run.name)
        check_once(groups, STEPS, TASKS)
        assert len(groups) == starts, f"the worker group was started {len(groups)} times, not {starts}"
        whole, seconds = self.reference(workers)
        assert_same(whole, final(run))
        return seconds


def _last_of_each(overrides: list[str]) -> list[str]:
    """Without those that a later one of the same key replaces, and without the width of another backbone."""
    chosen = {override.partition("=")[0]: override for override in overrides}
    if "backbone" in chosen:
        del chosen["backbone.width"]
    return list(chosen.values())


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
