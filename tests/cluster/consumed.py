"""What the workers trained on, from the notes of ``recorded.Recorded``, against the plan.

An episode is known by the SHA-256 of its pixels, so that nothing here rests on what the product says of itself.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data.batches import local_batches
from pipeline.data.dataset import Dataset
from pipeline.model import build_preprocess
from pipeline.training.learner import Learner
from pipeline.training.loop import make_planner
from pipeline.training.prepare import prepare
from tests.cluster.recorded import digest


@dataclass
class Group:
    """One start of the worker group: the steps that each of its workers took, and with which episodes."""

    workers: int
    began: float
    taken: dict[int, list[tuple[int, list[int]]]]  # rank -> [(step, episode numbers)]

    @property
    def first(self) -> int:
        return min(steps[0][0] for steps in self.taken.values())

    @property
    def last(self) -> int:
        """The last step that every worker has taken part in."""
        return min(self.taken[rank][-1][0] if rank in self.taken else -1 for rank in range(self.workers))


def planned(raw: Config, local_root: str) -> dict[str, int]:
    """Every episode of the run by its pixels: digest -> episode number; from a local copy of the dataset."""
    raw = {**raw, "name": "plan", "data": {**raw["data"], "root": local_root}}
    config, _, run = prepare(raw)
    dataset, preprocess = Dataset(config.dataset_uri), build_preprocess(run.spec)
    planner = make_planner(config, dataset.manifest, Learner(config, run.spec).method)
    numbers = {}
    for step, batch in local_batches(dataset, planner, 0, config.steps):
        support, query = preprocess(batch.support), preprocess(batch.query)
        for task in range(len(support)):
            numbers[digest(support[task], query[task])] = step * len(support) + task
    assert len(numbers) == config.steps * config.train.meta_batch_size, "two episodes of the plan are the same"
    return numbers


def read_groups(notes: Path, plan: dict[str, int], per_step: int) -> list[Group]:
    """The starts of the worker group in their order; an episode that is not in the plan is an error."""
    groups: dict[str, Group] = {}
    for file in notes.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            entry: dict[str, Any] = json.loads(line)
            numbers = [plan[episode] for episode in entry["episodes"]]
            key = entry["group"] if entry["workers"] > 1 else file.name
            group = groups.setdefault(key, Group(entry["workers"], entry["time"], defaultdict(list)))
            group.began = min(group.began, entry["time"])
            steps = {number // per_step for number in numbers}
            assert len(steps) == 1, f"episodes of several steps in one: {numbers}"
            group.taken[entry["rank"]].append((steps.pop(), numbers))
    return sorted(groups.values(), key=lambda group: group.began)


def check_once(groups: list[Group], steps: int, per_step: int) -> None:
    """Every step of the run that made the weights used each of its episodes once, on whatever workers.

    Within a start of the group steps follow each other; workers share a step without overlap; a new start goes on at a
    step that the one before had reached, so that no step is missing between them.
    """
    assert groups and groups[0].first == 0 and groups[-1].last == steps - 1
    for group in groups:
        for rank, taken in group.taken.items():
            assert [step for step, _ in taken] == list(range(group.first, group.first + len(taken))), f"rank {rank}"
        share = per_step // group.workers
        for rank, taken in group.taken.items():
            for step, numbers in taken:
                first = step * per_step + rank * share
                assert numbers == list(range(first, first + share)), (step, rank, numbers)
        for step in range(group.first, group.last + 1):
            used = [n for taken in group.taken.values() for s, numbers in taken if s == step for n in numbers]
            assert sorted(used) == list(range(step * per_step, (step + 1) * per_step)), f"step {step}: {used}"
    for before, after in zip(groups, groups[1:], strict=False):
        assert after.first <= before.last + 1, f"steps {before.last + 1}..{after.first - 1} were left out"
