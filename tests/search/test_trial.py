"""A trial as Ray Tune runs it: what one process trains ends as it would alone, and what goes wrong is told."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict
from typing import Any

import pytest
import torch

from pipeline.config import validate
from pipeline.data.batches import local_batches
from pipeline.data.dataset import Dataset
from pipeline.errors import Unavailable
from pipeline.search.asha import ASHA
from pipeline.search.ledger import Ledger
from pipeline.search.searchers import SearchTrials, run_trials
from pipeline.search.trial import ACCURACY, DONE, FAILED, FINISHED, STEP, Trial, last_line, superfluous, under_ray_train
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.config import TrainConfig
from pipeline.training.diagnosis import WORKERS_LOST
from pipeline.training.learner import Learner, make_deterministic
from pipeline.training.loop import make_planner, train
from pipeline.training.runs import Run, checkpoints

VALUES = [
    {"method": "matching", "method.distance": "cosine", "method.scale": 5.0, "method.learn_scale": False},
    {"method.distance": "cosine", "method.scale": 10.0, "method.learn_scale": True, "method": "prototypical"},
    {"method.distance": "euclidean", "method.scale": 1.0, "method.learn_scale": False, "method": "prototypical"},
]


def given(run: Run, until: int = 0) -> dict[str, Any]:
    return {"number": 0, "name": run.name, "run": json.dumps(asdict(run)), "until": until}


def alone(run: Run) -> dict[str, torch.Tensor]:
    config = validate(TrainConfig, run.config)
    make_deterministic(config.cluster.threads_per_worker, config.deterministic)
    learner, dataset = Learner(config, run.spec), Dataset(config.dataset_uri)
    planner = make_planner(config, dataset.manifest, learner.method)
    train(learner, local_batches(dataset, planner, 0, config.steps), dataset, planner.per_step)
    return learner.method.state_dict()


def assert_as_alone(run: Run) -> None:
    found, expected = load_checkpoint(checkpoints(run.uri)[-1]).model, alone(run)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_trials_of_one_process_end_as_each_alone(campaign):
    """Bit for bit; the first is stopped in the middle, and goes on later, in another process, from its checkpoint."""
    small = campaign("base.steps=18", "base.augmentation.flip=true")
    runs = [small.prepare(values, f"one-{number}") for number, values in enumerate(VALUES)]
    trial = Trial(given(runs[0]))
    assert [trial.step()[STEP] for _ in range(2)] == [6, 12]
    for run in runs[1:]:
        assert trial.reset_config(given(run))
        told = [trial.step() for _ in range(4)]
        assert [entry.get(STEP) for entry in told] == [6, 12, 18, None]
        assert told[-1] == {FINISHED: True, DONE: True} and all(0 <= entry[ACCURACY] <= 1 for entry in told[:3])
    trial.cleanup()
    assert load_checkpoint(checkpoints(runs[0].uri)[-1]).step == 12
    other = Trial(given(runs[0]))
    assert other.step()[STEP] == 18 and other.step() == {FINISHED: True, DONE: True}
    for run in runs:
        assert_as_alone(run)


def test_a_trial_that_pauses_is_done_at_its_step(campaign):
    run = campaign("base.steps=18").prepare(VALUES[1], "pausing")
    trial = Trial(given(run, until=12))
    assert DONE not in trial.step() and trial.step() == {STEP: 12, ACCURACY: pytest.approx(0.5, abs=0.5), DONE: True}


def test_what_goes_wrong_is_told_in_one_line(campaign, monkeypatch):
    small = campaign(space={"optimizer.lr": {"low": 1e-5, "high": 1.0, "log": True}}, first=[{}])
    run = small.prepare({"optimizer.lr": 1e30}, "diverging")
    said = Trial(given(run)).step()
    assert said[DONE] and said[FAILED].startswith("the loss is") and "\n" not in said[FAILED]
    other = Run(**{**asdict(run), "dataset": {**run.dataset, "fingerprint": "other"}})
    assert "is not the dataset that the run began with" in Trial(given(other)).step()[FAILED]
    monkeypatch.setattr("pipeline.search.trial.make_planner", lambda *_: 1 / 0)
    assert Trial(given(run)).step()[FAILED] == "ZeroDivisionError: division by zero"
    assert last_line(RuntimeError("first\n  last \n")) == "last" and last_line(RuntimeError()) == "no message"


def test_what_goes_wrong_concerns_one_trial(ray_session, campaign):
    """One diverges, one asks for the impossible, one is stopped; the others go on in the processes that are there."""
    space = {
        "optimizer.lr": {"low": 1e-5, "high": 1.0, "log": True},
        "train.way": {"low": 2, "high": 6, "integer": True},
    }
    first = [{}, {"optimizer.lr": 1e30}, {"train.way": 600}, {"train.way": 3}, {"optimizer.lr": 1e-2}]
    small = campaign("trials=5", space=space, first=first)
    ledger = Ledger(small.uri)

    class Scheduler(ASHA):
        def goes_on(self, number, run, step, accuracy):
            return number != 4 or step > 6

    run_trials(SearchTrials(small, ledger), Scheduler("asha", 12, 6, 3), None)
    status = {record.number: (record.status, record.step) for record in ledger.search}
    assert status[0] == status[3] == ("finished", 12) and status[4] == ("stopped", 6)
    assert status[1][0] == status[2][0] == "failed"
    reasons = {record.number: record.reason for record in ledger.search}
    assert reasons[1].startswith("the loss is") and "600" in reasons[2]
    assert reasons[4] == "not among the best at step 6"


def test_a_trial_whose_process_dies_goes_on_and_the_log_says_so_in_one_line(ray_session, campaign, tmp_path, capfd):
    small = campaign("trials=1")
    ledger, mark = Ledger(small.uri), tmp_path / "killed"

    class Dying(Trial):
        def step(self):
            found = super().step()
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return found

    run_trials(SearchTrials(small, ledger), None, None, Dying)
    [record] = ledger.search
    assert record.status == "finished" and mark.exists()
    said = "".join(capfd.readouterr())
    assert said.count(f"trial {record.run}: its process died; it goes on in another process") == 1
    assert "Traceback" not in said and "Error" not in said


def test_a_store_that_is_away_ends_no_trial(ray_session, campaign, tmp_path):
    """It is none's fault: the campaign ends, and goes on where it was."""
    small, back = campaign("trials=3", "concurrent=1"), tmp_path / "back"

    class Away(Trial):
        def reset_config(self, new_config):
            super().reset_config(new_config)
            if not back.exists():
                self._validations = self.nothing()
            return True

        def nothing(self):
            how = f"; then go on with it: {self._run.resume}"
            raise Unavailable(f"run {self._run.name}: s3://bucket does not answer{how}")
            yield

    with pytest.raises(Unavailable) as caught:
        run_trials(SearchTrials(small, Ledger(small.uri)), None, 1, Away)
    assert str(caught.value) == "trial small-0000: s3://bucket does not answer"
    assert [record.status for record in Ledger(small.uri).search] == ["running"]
    back.touch()
    run_trials(SearchTrials(small, Ledger(small.uri)), None, 1, Away)
    assert [record.status for record in Ledger(small.uri).search] == ["finished"] * 3


def test_workers_that_were_lost_may_be_the_trials_own_doing(campaign):
    small = campaign()
    trial = Trial(given(small.prepare(VALUES[1], "lost")))

    def lost():
        raise Unavailable(f"run lost: {WORKERS_LOST}")
        yield

    trial._validations = lost()
    assert trial.step() == {FAILED: WORKERS_LOST, DONE: True}


@pytest.mark.slow
def test_several_workers_tell_their_validations_and_leave_where_they_are_stopped(ray_session, campaign):
    """Under Ray Train; what they had is free again, and the run goes on from where it left."""
    small = campaign("base.cluster.workers=2", "base.steps=400", "base.validation.every=5", "base.checkpoint.every=5")
    config, run = small.train, small.prepare(VALUES[1], "two")
    validations = under_ray_train(config, run)
    assert next(validations)[STEP] == 5 and next(validations)[STEP] == 10
    validations.close()
    reached = load_checkpoint(checkpoints(run.uri)[-1]).step
    assert 10 <= reached < 400
    again = under_ray_train(config, run)
    assert next(again)[STEP] > reached
    again.close()


def test_the_best_checkpoints_and_the_latest_are_kept(tmp_path):
    accuracies = {1: 0.5, 2: 0.9, 3: 0.2, 4: 0.8, 5: 0.1}
    for step, accuracy in accuracies.items():
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        history = [{"step": s, "val/accuracy": a} for s, a in accuracies.items() if s <= step]
        (folder / "state.json").write_text(json.dumps({"step": step, "history": history, "accuracy": accuracy}))
    kept = set(checkpoints(str(tmp_path))) - set(superfluous(str(tmp_path), 2))
    assert sorted(int(uri[-8:]) for uri in kept) == [2, 4, 5]
