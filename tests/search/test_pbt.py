"""Population-based training without Ray: generations, who is replaced by whom, and what is resumed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline import store
from pipeline.config import validate
from pipeline.errors import PipelineError
from pipeline.search.ledger import Ledger, Record
from pipeline.search.pbt import PBT, perturbed
from pipeline.search.space import Space
from pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from pipeline.training.config import TrainConfig
from pipeline.training.learner import Learner
from pipeline.training.runs import START

SPACE = {
    "optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True},
    "method.scale": {"low": 0.1, "high": 100, "log": True},
}
POPULATION = ["scheduler.kind=pbt", "scheduler.grace=6", "scheduler.factor=3", "trials=6", "base.steps=18"]


def accuracy(record: Record, step: int) -> float:
    return round(0.5 + 0.01 * step - 0.1 * abs(np.log10(record.values["optimizer.lr"]) + 3), 6)


def work(plan: PBT, trials: int | None = None) -> list[tuple[int, int]]:
    """As Tune does, two at a time, each to the end of its generation; stopped in the midst after so many."""
    handed: list[tuple[int, int]] = []
    running: list[tuple[Record, int]] = []
    while True:
        while len(running) < 2 and (found := plan.next()) is not None:
            record, run = found
            running.append((record, plan.until()))
            handed.append((record.number, running[-1][1]))
            if len(handed) == trials:
                return handed
        if not running:
            assert not plan.waits()
            return handed
        record, until = running.pop(0)
        step = until or 18
        record = record.with_point(step, accuracy(record, step))
        learner = Learner(validate(TrainConfig, plan.campaign.compose(record.values, record.run)), run.spec)
        learner.step = step
        learner.history = [{"step": float(s), "val/accuracy": accuracy} for s, accuracy in record.curve]
        save_checkpoint(store.join(plan.campaign.uri, record.run, f"step_{step:08d}"), learner.checkpoint({}, {}))
        plan.ledger.put(record)
        plan.stopped(record, step) if until else plan.end(replace(record, status="finished"))


def test_a_number_that_was_written_whole_moves_as_a_number():
    steps = {"low": 1, "high": 9, "integer": True}
    space = Space({"method.scale": {"low": 0.1, "high": 100}, "method.inner_steps": steps})
    moved = [perturbed(space, {"method.scale": 1, "method.inner_steps": 4}, np.random.default_rng(n)) for n in range(9)]
    assert {values["method.scale"] for values in moved} == {0.8, 1.2}
    assert {values["method.inner_steps"] for values in moved} == {3, 5}
    assert all(isinstance(values["method.inner_steps"], int) for values in moved)


def test_the_worst_make_room_for_copies_of_the_best(campaign):
    small = campaign(*POPULATION, space=SPACE, first=[{}])
    ledger, told = Ledger(small.uri), []
    handed = work(PBT(small, ledger, told.append))
    records = {record.number: record for record in ledger.search}
    assert sorted(handed[:6]) == [(number, 6) for number in range(6)]  # all in one generation, before the next
    for step in (6, 12):
        members = [r for r in records.values() if step in dict(r.curve) and r.began_at < step]
        members.sort(key=lambda r: (-dict(r.curve)[step], r.number))
        copies = [r for r in records.values() if r.began_at == step]
        assert len(members) == 6 and len(copies) == 2
        assert {r.parent for r in copies} <= {r.run for r in members[:2]}
        assert [r.status for r in members[-2:]] == ["stopped"] * 2 and "replaced by a copy" in members[-1].reason
        for copy in copies:
            parent = next(r for r in members if r.run == copy.parent)
            assert dict(copy.curve)[step] == dict(parent.curve)[step]
            for key, value in copy.values.items():
                low, high = SPACE[key]["low"], SPACE[key]["high"]
                moved = [min(max(parent.values[key] * factor, low), high) for factor in (0.8, 1.2)]
                assert value in [pytest.approx(choice) for choice in moved]
            assert load_checkpoint(store.join(small.uri, copy.run, START)).step == step
    assert sorted(r.status for r in records.values()) == ["finished"] * 6 + ["stopped"] * 4
    assert len(told) == 10


def test_an_interrupted_population_ends_as_an_untouched_one(campaign, tmp_path):
    def found(uri: str, *stops: int | None) -> list[tuple]:
        small = campaign(*POPULATION, f"storage={tmp_path}/{uri}", space=SPACE, first=[{}])
        for stop in (*stops, None):
            work(PBT(small, Ledger(small.uri)), stop)  # all that is left is in the folder
        keys = ("number", "run", "values", "status", "curve", "parent", "began_at")
        return [tuple(getattr(record, key) for key in keys) for record in Ledger(small.uri).search]

    assert found("parts", 3, 5, 2, 6) == found("whole")


def test_a_member_whose_last_checkpoint_the_ledger_had_not_heard_of_is_in_the_next_generation(campaign):
    """Killed between the two: trained on from that checkpoint it would be a generation ahead of the others."""
    small = campaign(*POPULATION, space=SPACE, first=[{}])
    work(PBT(small, Ledger(small.uri)), 5)
    ledger = Ledger(small.uri)
    told = next(record for record in ledger.search if record.step == 6)
    ledger.put(replace(told, curve=()))
    handed = work(PBT(small, Ledger(small.uri)), 4)
    assert (told.number, 6) not in handed and {until for _, until in handed[:3]} == {6}


def test_a_member_that_failed_is_replaced(campaign):
    small = campaign(*POPULATION, space=SPACE, first=[{}])
    ledger = Ledger(small.uri)
    plan = PBT(small, ledger)
    record, _ = plan.next()
    plan.end(replace(record, status="failed", reason="the loss is nan"))
    work(plan)
    members = [record for record in ledger.search if record.began_at == 6]
    assert len(members) == 2 and sum(record.status == "finished" for record in ledger.search) == 6
    assert sum(record.status == "stopped" and record.step == 6 for record in ledger.search) == 1


def test_values_are_perturbed_within_their_ranges():
    space = Space({
        "optimizer.lr": {"low": 1.0e-3, "high": 1.1e-3, "log": True},
        "method.steps": {"low": 1, "high": 9, "integer": True},
        "method.kind": {"choices": ["a", "b"]}, "backbone.width": {"low": 8, "high": 64, "integer": True},
    })  # fmt: skip
    values = {"optimizer.lr": 1e-3, "method.steps": 2, "method.kind": "a", "backbone.width": 16}
    seen = [perturbed(space, values, np.random.default_rng(seed)) for seed in range(40)]
    assert {v["optimizer.lr"] for v in seen} == {1.0e-3, 1.1e-3} and {v["method.steps"] for v in seen} == {1, 3}
    assert all(v["method.kind"] == "a" and v["backbone.width"] == 16 for v in seen)


def test_a_copy_goes_on_with_its_own_options(campaign):
    """Weights, moments and position are the parent's; rates, and weights that are not trained, the copy's own."""
    small = campaign(*POPULATION, space=SPACE, first=[{}])
    learners = []
    for lr, scale in ((1e-3, 1.0), (1.2e-3, 5.0)):
        values = {"optimizer.lr": lr, "method.scale": scale}
        config = validate(TrainConfig, small.compose(values, "x", seed=int(scale)))
        learners.append(Learner(config, small.prepare(values, "x", seed=int(scale)).spec))
    parent, copy = learners
    for parameter in parent.method.parameters():
        if parameter.requires_grad:
            parameter.grad = parameter.detach() + 1
    parent.optimizer.step()
    parent.step = 6
    copy.inherit(parent.checkpoint({}, {}))
    assert copy.step == 6 and copy.method.scale.item() == 5 and copy.optimizer.param_groups[0]["base_lr"] == 1.2e-3
    theirs = dict(parent.method.named_parameters())
    for name, parameter in copy.method.named_parameters():
        if parameter.requires_grad:
            assert parameter.equal(theirs[name])
            moment = copy.optimizer.state[parameter]["exp_avg"]
            assert moment.equal(parent.optimizer.state[theirs[name]]["exp_avg"]) and moment.any()


def test_campaigns_of_an_earlier_release_called_it_population(campaign):
    assert campaign("scheduler.kind=population").config.scheduler.kind == "pbt"


def test_refusals(campaign):
    with pytest.raises(PipelineError, match="trials=2: a population has at least scheduler.factor=3"):
        small = campaign(*POPULATION, "trials=2", space=SPACE, first=[{}])
        PBT(small, Ledger(small.uri))
    with pytest.raises(PipelineError, match="perturbs numbers"):
        small = campaign(
            *POPULATION, space={"method.distance": {"choices": ["cosine", "squared_euclidean"]}}, first=[{}]
        )
        PBT(small, Ledger(small.uri))
