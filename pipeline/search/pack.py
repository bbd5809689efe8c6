"""Several trials in one process, which trains them in step, on batches that it gathers once.

The trials of a campaign have one seed and one dataset, so those that train on the same episodes can share the stream,
the process and its start. Every trial keeps its own weights, options and random numbers, and ends with the weights that
it would have alone, bit for bit on a CPU.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from pipeline import store
from pipeline.batch import Batch
from pipeline.config import validate
from pipeline.data.dataset import Dataset
from pipeline.data.stream import Stream
from pipeline.errors import PipelineError
from pipeline.search.trial import ACCURACY, STEP
from pipeline.training.checkpoint import STATE, load_checkpoint, save_checkpoint
from pipeline.training.config import TrainConfig
from pipeline.training.learner import Learner, make_deterministic
from pipeline.training.loop import Hooks, make_planner, training
from pipeline.training.runs import START, Run, checkpoints, write_run

Told = dict[str, Any]  # "step", ACCURACY, "failed": reason, "finished"


def shares(config: TrainConfig, regime: str) -> str:
    """What trials must have in common to be trained together: the episodes of every step, and where they run."""
    parts = [regime, config.seed, config.steps, config.train, config.data, config.cluster, config.materialize]
    return repr((*parts, config.deterministic, config.validation.every))


@dataclass
class _Member:
    """A trial of a pack."""

    run: Run
    learner: Learner
    body: Generator[None, tuple[int, Batch], None] = field(init=False)
    told: Told | None = None  # since it was last asked


@ray.remote
class Pack:
    """Trials that :func:`shares` finds alike. Each goes on from its last checkpoint, if it has one."""

    def __init__(self, runs: list[Run]) -> None:
        configs = [validate(TrainConfig, run.config) for run in runs]
        first = configs[0]
        make_deterministic(first.cluster.threads_per_worker, first.deterministic)
        device = torch.device("cuda" if first.cluster.gpus_per_worker else "cpu")
        self._dataset = Dataset(first.dataset_uri)
        learners = [self._learner(config, run, device) for run, config in zip(runs, configs, strict=True)]
        self._members = {run.name: _Member(run, learner) for run, learner in zip(runs, learners, strict=True)}
        planner = make_planner(first, self._dataset, learners[0].method)
        begin = min(learner.step for learner in learners)
        self._stream = iter(
            Stream(self._dataset, planner, begin, first.steps, device=device, materialize=first.materialize)
        )
        for member in self._members.values():
            hooks = Hooks(save=self._save)
            member.body = training(member.learner, self._dataset, planner.per_step, hooks=hooks)
            self._go(member, None)

    def advance(self, keep: list[str]) -> dict[str, Told]:
        """Train the members named in ``keep``, and let the others go, until some were validated or came to an end."""
        for name in [name for name in self._members if name not in keep]:
            self._members.pop(name).body.close()
        while self._members:
            told = {name: member.told for name, member in self._members.items() if member.told is not None}
            if told:
                for name, found in told.items():
                    self._members[name].told = None
                    if "failed" in found or "finished" in found:
                        self._members.pop(name)
                return told
            self._step()
        return {}

    def _step(self) -> None:
        item = next(self._stream)  # one that was resumed may be ahead of the others
        for member in self._members.values():
            if member.learner.step == item[0]:
                self._go(member, item)

    def _go(self, member: _Member, item: tuple[int, Batch] | None) -> None:
        """Send a batch to a member's loop, and keep what comes of it."""
        try:
            member.body.send(item) if item is not None else next(member.body)
        except StopIteration:
            member.told = {**(member.told or {}), STEP: member.learner.step, "finished": True}
        except PipelineError as error:
            member.told = {"failed": str(error)}
        except Exception as error:  # of this trial alone
            member.told = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:300]}"}

    def _save(self, learner: Learner) -> None:
        member = next(member for member in self._members.values() if member.learner is learner)
        run = member.run
        folder = tempfile.mkdtemp(prefix="checkpoint-")
        try:
            save_checkpoint(folder, learner.checkpoint(run.config, run.dataset))
            target = store.join(run.uri, f"step_{learner.step:08d}")
            for name in sorted(store.list_names(folder), key=lambda name: name == STATE):  # it makes the others count
                store.write_bytes(store.join(target, name), store.read_bytes(store.join(folder, name)))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        last = learner.history[-1] if learner.history else {}
        if last.get("step") == learner.step and ACCURACY in last:
            member.told = {STEP: learner.step, ACCURACY: last[ACCURACY]}
        for uri in superfluous(run.uri, learner.config.checkpoint.keep):
            store.remove(uri)

    def _learner(self, config: TrainConfig, run: Run, device: torch.device) -> Learner:
        if self._dataset.manifest.fingerprint != run.dataset["fingerprint"]:
            raise PipelineError(f"{config.dataset_uri} is not the dataset that the campaign began with")
        learner, start = Learner(config, run.spec, device=device), store.join(run.uri, START)
        write_run(run)
        if found := checkpoints(run.uri):
            learner.restore(load_checkpoint(found[-1]))
        elif store.exists(store.join(start, STATE)):
            learner.inherit(load_checkpoint(start))
        if config.compile:
            learner.module = torch.compile(learner.module)  # type: ignore[assignment]
        return learner


def superfluous(run_uri: str, keep: int) -> Iterator[str]:
    """Checkpoints that are neither among the best ``keep`` nor the latest, as Ray Train deletes them."""
    found = checkpoints(run_uri)
    scored = []
    for uri in found[:-1]:
        state = json.loads(store.read_bytes(store.join(uri, STATE)))
        here = [e[ACCURACY] for e in state["history"] if e["step"] == state["step"] and ACCURACY in e]
        scored.append((here[-1] if here else -1.0, uri))
    scored.sort(key=lambda entry: entry[0], reverse=True)
    yield from (uri for _, uri in scored[keep:])
