"""Trials that one process trains together end as they do alone."""

from __future__ import annotations

import pytest
import ray
import torch

from pipeline.config import compose, validate
from pipeline.data.dataset import Dataset
from pipeline.errors import PipelineError
from pipeline.search.arguments import translate
from pipeline.search.halving import Halving
from pipeline.search.ledger import Ledger
from pipeline.search.pack import Pack, superfluous
from pipeline.search.packs import check_packs, run_packs
from pipeline.search.plans import SearchPlan
from pipeline.search.run import tune
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.config import TrainConfig
from pipeline.training.learner import Learner, make_deterministic
from pipeline.training.loop import make_planner, train
from pipeline.training.runs import checkpoints
from tests.training.test_loop import local_batches

VALUES = [
    {"method.distance": "cosine", "method.scale": 10.0, "method.learn_scale": True, "method": "prototypical"},
    {"method.distance": "euclidean", "method.scale": 1.0, "method.learn_scale": False, "method": "prototypical"},
    {"method": "matching", "method.distance": "cosine", "method.scale": 5.0, "method.learn_scale": False},
]


def alone(run) -> dict[str, torch.Tensor]:
    config = validate(TrainConfig, run.config)
    make_deterministic(config.cluster.threads_per_worker, config.deterministic)
    learner, dataset = Learner(config, run.spec), Dataset(config.dataset_uri)
    planner = make_planner(config, dataset, learner.method)
    train(learner, local_batches(dataset, planner, 0, config.steps), dataset, planner.per_step)
    return learner.method.state_dict()


def weights(run) -> dict[str, torch.Tensor]:
    return load_checkpoint(checkpoints(run.uri)[-1]).model


def test_together_they_end_as_alone(ray_session, campaign):
    """Bit for bit; one is let go in the middle, and one goes on in another process from its checkpoint."""
    small = campaign("base.steps=18", "base.augmentation.flip=true")
    runs = [small.prepare(values, f"together-{number}") for number, values in enumerate(VALUES)]
    names = [run.name for run in runs]
    pack = Pack.remote(runs)
    told = ray.get(pack.advance.remote(names))
    assert sorted(told) == names and {found["step"] for found in told.values()} == {6}
    told = ray.get(pack.advance.remote(names[:2]))
    assert sorted(told) == names[:2]
    ray.kill(pack)
    pack = Pack.remote([runs[0], runs[2]])  # at steps 12 and 6
    seen: dict[str, list] = {name: [] for name in names}
    while told := ray.get(pack.advance.remote(names)):
        for name, found in told.items():
            seen[name].append((found["step"], "finished" in found))
    assert seen[names[0]] == [(18, True)] and seen[names[2]] == [(12, False), (18, True)] and not seen[names[1]]
    for number in (0, 2):
        expected = alone(runs[number])
        for name, tensor in weights(runs[number]).items():
            assert torch.equal(tensor, expected[name]), name
    assert load_checkpoint(checkpoints(runs[1].uri)[-1]).step == 12


def test_what_goes_wrong_concerns_one_trial(ray_session, campaign):
    """One diverges, one asks for the impossible, one is stopped; those of other episodes train apart."""
    space = {
        "optimizer.lr": {"low": 1e-5, "high": 1.0, "log": True},
        "train.way": {"low": 2, "high": 6, "integer": True},
    }
    first = [{}, {"optimizer.lr": 1e30}, {"train.way": 600}, {"train.way": 3}, {"optimizer.lr": 1e-2}]
    small = campaign("trials=5", "together=5", space=space, first=first)
    ledger = Ledger(small.uri)

    class Scheduler(Halving):
        def goes_on(self, number, run, step, accuracy):
            return number != 4

    run_packs(SearchPlan(small, ledger), Scheduler("asha", 12, 6, 3), None)
    status = {record.number: (record.status, record.step) for record in ledger.search}
    assert status[0] == status[3] == ("finished", 12) and status[4] == ("stopped", 6)
    assert status[1][0] == status[2][0] == "failed"
    reasons = {record.number: record.reason for record in ledger.search}
    assert reasons[1].startswith("the loss is NaN or infinite") and "600" in reasons[2]
    assert reasons[4] == "not among the best at step 6"


@pytest.mark.slow
def test_a_campaign_of_packs(ray_session, arguments):
    raw = compose("tune", translate(arguments("trials=6", "together=3", "finalists={count: 2, seeds: 2}")))
    found = tune(raw)
    assert found["exit_code"] == 0 and found["best"]["run"]
    assert sum(trial["seed"] is not None and trial["status"] == "finished" for trial in found["trials"]) >= 4


def test_the_best_checkpoints_and_the_latest_are_kept(small_runs):
    run, accuracies = small_runs
    kept = set(checkpoints(run)) - set(superfluous(run, 2))
    best = sorted(accuracies, key=lambda step: -accuracies[step])[:2]
    assert sorted(int(uri[-8:]) for uri in kept) == sorted({*best, max(accuracies)})


@pytest.fixture
def small_runs(tmp_path):
    import json

    accuracies = {1: 0.5, 2: 0.9, 3: 0.2, 4: 0.8, 5: 0.1}
    for step, accuracy in accuracies.items():
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        history = [{"step": s, "val/accuracy": a} for s, a in accuracies.items() if s <= step]
        (folder / "state.json").write_text(json.dumps({"step": step, "history": history, "accuracy": accuracy}))
    return str(tmp_path), accuracies


def test_refusals(campaign):
    with pytest.raises(PipelineError, match="together=4: .* set base.cluster.workers=1"):
        check_packs(campaign("together=4", "base.cluster.workers=2"))
    with pytest.raises(PipelineError, match="members of a population train each by itself"):
        check_packs(campaign("together=4", "scheduler.kind=population"))
