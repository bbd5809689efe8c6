"""Trials on the cluster, several to a process: an alternative to one run under Ray Train for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import ray

from pipeline.config import validate
from pipeline.errors import PipelineError
from pipeline.model import build_model
from pipeline.search.campaign import Campaign
from pipeline.search.feed import CRASHED
from pipeline.search.halving import Halving
from pipeline.search.ledger import Record
from pipeline.search.pack import Pack, Told, shares
from pipeline.search.plans import Plan
from pipeline.search.schedule import DRIVER_CPUS, room
from pipeline.search.trial import ACCURACY, STEP
from pipeline.training.cluster import capacity
from pipeline.training.config import TrainConfig
from pipeline.training.runs import Run


@dataclass
class _Open:
    """A pack that trains: its process, and its trials by name."""

    process: ray.actor.ActorHandle
    trials: dict[str, tuple[Record, Run]]
    again: bool = True  # begun once more where its process dies

    def advance(self) -> ray.ObjectRef:
        return self.process.advance.remote(list(self.trials))


def check_packs(campaign: Campaign) -> None:
    """Refuse what cannot be trained together."""
    config, cluster = campaign.config, campaign.train.cluster
    if config.together > 1 and cluster.workers > 1:
        raise PipelineError(
            f"together={config.together}: trials that share a process have one worker: set base.cluster.workers=1"
        )
    if config.together > 1 and config.scheduler.kind == "population":
        raise PipelineError(f"together={config.together}: members of a population train each by itself")


def run_packs(plan: Plan, scheduler: Halving | None, at_once: int | None) -> None:
    """Until the plan has no more: as many packs at once as there is room for, ``together`` trials in each."""
    size = plan.campaign.config.together
    places = room(plan.campaign.train.cluster, capacity())
    places = min(places, at_once or places)
    waiting: list[list[tuple[Record, Run]]] = []
    running: dict[ray.ObjectRef, _Open] = {}
    try:
        while True:
            while len(running) < places and (waiting or (waiting := list(_packs(plan, size)))):
                pack = _begin(waiting.pop(0))
                running[pack.advance()] = pack
            if not running:
                return
            [ready], _ = ray.wait(list(running), num_returns=1)
            pack = running.pop(ready)
            try:
                told = ray.get(ready)
            except ray.exceptions.RayActorError:
                if pack.again:
                    trials = list(pack.trials.values())
                    pack = replace(_begin(trials), again=False)
                    running[pack.advance()] = pack
                else:
                    for record, _run in pack.trials.values():
                        plan.end(replace(record, status="failed", reason=CRASHED))
                continue
            for name, found in told.items():
                _settle(plan, scheduler, pack, name, found)
            if pack.trials:
                running[pack.advance()] = pack
            else:
                ray.kill(pack.process)
    finally:
        for pack in running.values():
            ray.kill(pack.process)


def _packs(plan: Plan, size: int) -> Iterator[list[tuple[Record, Run]]]:
    """The plan's next trials, those together that can be."""
    taken: list[tuple[Record, Run]] = []
    while len(taken) < size and (found := plan.next()) is not None:
        taken.append(found)
    alike = sorted(((_alike(run), number) for number, (_, run) in enumerate(taken)))
    for _, group in groupby(alike, key=lambda entry: entry[0]):
        yield [taken[number] for _, number in group]


def _alike(run: Run) -> str:
    return shares(validate(TrainConfig, run.config), build_model(run.spec).regime)


def _begin(trials: Sequence[tuple[Record, Run]]) -> _Open:
    runs = [run for _, run in trials]
    cluster = validate(TrainConfig, runs[0].config).cluster
    options = {"num_cpus": cluster.cpus_per_worker + DRIVER_CPUS, "num_gpus": cluster.gpus_per_worker}
    process = Pack.options(**options).remote(runs)  # type: ignore[attr-defined]
    return _Open(process, {record.run: (record, run) for record, run in trials})


def _settle(plan: Plan, scheduler: Halving | None, pack: _Open, name: str, found: Told) -> None:
    """Note what became of a trial, and let it go where it is over."""
    record, run = pack.trials.pop(name)
    if ACCURACY in found:
        record = record.with_point(int(found[STEP]), float(found[ACCURACY]))
    if "failed" in found:
        plan.end(replace(record, status="failed", reason=str(found["failed"])))
    elif "finished" in found:
        plan.end(replace(record, status="finished"))
    elif scheduler is not None and not scheduler.goes_on(record.number, record.run, *record.curve[-1]):
        plan.stopped(record, record.step)
    else:
        plan.ledger.put(record)
        pack.trials[name] = (record, run)
