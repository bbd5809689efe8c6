"""Stopped at every line between its stages a retraining is finished by the next call, once.

Here with the real journal, lease, registry and aliases, and a training and a measurement that take no time;
``test_crash`` does the same with the real ones.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from mlflow import MlflowClient

from pipeline import workflow
from pipeline.config import Config, compose
from pipeline.data.write import write_dataset
from pipeline.errors import Diverged, PipelineError, Stopped, Unavailable
from pipeline.model import build_model
from pipeline.registry import aliases
from pipeline.registry.aliases import DECISION_TAG, Decision, settle
from pipeline.registry.promotion import PromoteConfig
from pipeline.registry.tracking_config import registering
from pipeline.registry.versions import register, set_alias
from pipeline.retraining import run
from pipeline.retraining.champion import champion_of, keep_weights
from pipeline.retraining.journal import Journal
from pipeline.retraining.report import RETRAINING_TAG
from pipeline.training.checkpoint import Checkpoint, load_checkpoint
from pipeline.training.runs import Run
from tests.data.test_write import some_classes
from tests.retraining.conftest import arguments
from tests.retraining.test_crash import STOPS, Stop, stopping

SPEC = {
    "method": {"name": "prototypical"}, "backbone": {"name": "conv4", "width": 4},
    "input": {"shape": [1, 16, 16], "scaling": "unit"}, "way": 2, "classes": 2,
}  # fmt: skip
CALLS: Counter[str] = Counter()
DIFFERENCE = [0.1]  # of the next measurement


def make_data(home: Path, seed: int) -> str:
    splits = {"train": ["a", "c"], "val": ["b"], "test": ["d"]}
    uri = f"{home}/datasets/growing"
    return write_dataset(uri, "growing", some_classes(seed, (1, 16, 16)).items(), splits, overwrite=True).fingerprint


def checkpoint(spec: dict[str, Any], seed: int = 99) -> Checkpoint:
    torch.manual_seed(seed)
    origin = {"name": "", "fingerprint": "", "uri": ""}
    return Checkpoint(1, spec, {}, origin, {}, [], dict(build_model(spec).state_dict()))


def train(raw: Config) -> dict[str, Any]:
    """As ``workflow.train``: a run by its name is trained once, and registered once."""
    CALLS["train"] += 1
    name = raw["name"]
    torch.manual_seed(raw["seed"])
    dataset = json.loads(Path(raw["data"]["root"], "growing", "manifest.json").read_text())
    about = {"name": "growing", "fingerprint": dataset["fingerprint"], "uri": ""}
    weights = dict(build_model(SPEC).state_dict())
    made = register(name, Checkpoint(1, SPEC, {"seed": 0}, about, {}, [], weights), raw["tracking"], "people")
    workflow.register(name, raw)  # replaced below: the place where this one can be stopped
    set_alias(raw["tracking"], "people", "challenger", made.version)
    return {"version": made.version}


def measure(config: PromoteConfig, challenger: int, champion: int | None) -> Decision:
    CALLS["measure"] += 1
    figures: dict[str, Any] = {
        "split": "test", "way": 5, "shot": 1, "query": 5, "episodes": 40, "confidence": 0.95,
        "accuracy.challenger": 0.5,
    }  # fmt: skip
    if champion is None:
        return Decision("people", challenger, None, True, "there was no champion", figures)
    low, high = DIFFERENCE[0] - 0.01, DIFFERENCE[0] + 0.01
    figures |= {"low": low, "high": high, "difference": DIFFERENCE[0], "accuracy.champion": 0.5 - DIFFERENCE[0]}
    return Decision("people", challenger, champion, low > 0, "measured", figures)


@pytest.fixture
def quick(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(workflow, "train", train)
    monkeypatch.setattr(workflow, "register", lambda *args: {})
    monkeypatch.setattr(run, "measure", measure)
    CALLS.clear()
    DIFFERENCE[0] = 0.1
    return home


def retrained(home: Path, *more: str) -> dict[str, Any]:
    small = ["retrain.ingest=false", "retrain.promotion.way=1", "retrain.promotion.query=2"]
    return run.retrain(compose("retrain", arguments(home, *small, *more)))


def store(home: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{home}/mlflow.db")


def aliases_of(home: Path) -> dict[str, int]:
    assert [model.name for model in store(home).search_registered_models()] == ["people"]  # no lock is left
    return {name: int(v) for name, v in store(home).get_registered_model("people").aliases.items()}


def tagged(home: Path, tag: str) -> int:
    client = store(home)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert {found.info.status for found in runs if tag in found.data.tags} <= {"FINISHED"}
    return sum(tag in found.data.tags for found in runs)


def test_stopped_everywhere(quick: Path) -> None:
    make_data(quick, 0)
    assert retrained(quick)["outcome"] == "promoted" and aliases_of(quick) == {"champion": 1, "challenger": 1}
    make_data(quick, 1)
    for module, name, when in STOPS:
        with pytest.MonkeyPatch.context() as patch:
            if when == "inside":
                patch.setattr(workflow, "train", stopping(workflow.train, "after"))
            else:
                patch.setattr(module, name, stopping(getattr(module, name), when))
            with pytest.raises(Stop):
                retrained(quick)
    last = retrained(quick)
    assert (last["outcome"], last["exit_code"]) == ("unchanged", 4)
    assert aliases_of(quick) == {"champion": 2, "previous": 1, "challenger": 2}
    assert len(store(quick).search_model_versions("name='people'")) == 2
    assert tagged(quick, DECISION_TAG) == 2 and tagged(quick, RETRAINING_TAG) == 2
    first, second = Journal(f"{quick}/runs/people.retraining").entries
    assert (second.stage, second.outcome, second.version, second.failures) == ("done", "promoted", 2, 0)
    assert first.fingerprint != second.fingerprint and second.champion == 1
    page = Path(f"{quick}/runs/people.retraining/{second.run}.md").read_text()
    assert "a new champion" in page and "| difference, 95 % interval | +10.00 (+9.00 … +11.00) |" in page
    recorded = json.loads(store(quick).get_model_version("people", "2").tags[DECISION_TAG])
    assert recorded["promoted"] and recorded["champion"] == 1 and recorded["figures"]["difference"] == 0.1


def test_a_contest_that_cannot_be_is_refused_before_the_training(quick: Path) -> None:
    make_data(quick, 0)
    trained = "retrain.promotion.split=test.train: the challenger is trained on split 'train' .train.split=train."
    for wrong, says in (
        ("split=tets", "has no split 'tets'"),
        ("way=2", "retrain.promotion.way=2: split 'test' has"),
        ("split=test+train", trained),
    ):
        with pytest.raises(PipelineError, match=says):
            retrained(quick, f"retrain.promotion.{wrong}")
    assert not CALLS and not Journal(f"{quick}/runs/people.retraining").entries
    assert retrained(quick)["outcome"] == "promoted"


def test_unchanged_better_and_worse(quick: Path) -> None:
    make_data(quick, 0)
    assert retrained(quick)["exit_code"] == 0
    assert retrained(quick)["exit_code"] == 4 and CALLS["train"] == 1
    assert retrained(quick, "retrain.exit_zero=true")["exit_code"] == 0
    make_data(quick, 1)
    better = retrained(quick)
    assert (better["exit_code"], better["champion"], better["champion_before"]) == (0, 2, 1)
    DIFFERENCE[0] = -0.1
    make_data(quick, 2)
    worse = retrained(quick)
    assert (worse["exit_code"], worse["outcome"], worse["champion"], worse["version"]) == (3, "kept", 2, 3)
    assert retrained(quick)["exit_code"] == 4 and CALLS == {"train": 3, "measure": 3}
    assert aliases_of(quick) == {"champion": 2, "previous": 1, "challenger": 3}
    DIFFERENCE[0] = 0.2
    forced = retrained(quick, "retrain.force=true")
    assert (forced["exit_code"], forced["version"]) == (0, 4) and CALLS["train"] == 4  # with another seed
    json.dumps(forced)


def test_a_model_that_was_deleted_and_made_again_is_another_one(quick: Path) -> None:
    """Its versions begin at 1 again, and what the journal says of the old ones is not about them."""
    prints = [make_data(quick, seed) for seed in (0, 1)]
    make_data(quick, 0)
    assert retrained(quick)["version"] == 1
    DIFFERENCE[0] = -0.1
    assert make_data(quick, 1) == prints[1] and retrained(quick)["outcome"] == "kept"
    assert make_data(quick, 0) == prints[0]
    store(quick).delete_registered_model("people")
    again = retrained(quick)
    assert (again["outcome"], again["reasons"]) == ("promoted", ["there is no champion"])
    make_data(quick, 1)
    beside = retrained(quick)
    assert (beside["exit_code"], beside["outcome"], beside["version"]) == (3, "kept", 2)
    runs = [entry.run for entry in Journal(f"{quick}/runs/people.retraining").entries]
    assert len(runs) == len(set(runs)) == 4 and retrained(quick)["exit_code"] == 4


@pytest.mark.parametrize("stage", ["measure", "settle"])
def test_a_challenger_whose_model_was_deleted_is_registered_again(quick: Path, stage: str) -> None:
    make_data(quick, 0)
    retrained(quick)
    make_data(quick, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, stage, stopping(getattr(run, stage), "before"))
        with pytest.raises(Stop):
            retrained(quick)
    store(quick).delete_registered_model("people")
    done = retrained(quick)
    assert (done["outcome"], done["version"], done["champion_before"]) == ("promoted", 1, None)


def test_a_warm_start_is_from_the_champion_of_now(quick: Path) -> None:
    """Not from the weights that were kept of a deleted model's version of the same number."""
    tracking = compose("retrain", arguments(quick))["tracking"]
    kept = []
    for seed in (1, 2):
        made = register(f"run {seed}", checkpoint(SPEC, seed), tracking, "people").version
        settle(tracking, Decision("people", made, None, True, "first"))
        champion = champion_of(tracking, "people")
        assert champion is not None and champion.version == 1
        kept.append(load_checkpoint(keep_weights(f"{quick}/runs/people.retraining", champion, tracking)).model)
        store(quick).delete_registered_model("people")
    assert any(not torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_overtaken_between_decision_and_promotion(quick: Path) -> None:
    """Somebody makes another version champion meanwhile: the challenger is measured again, against that one."""
    make_data(quick, 0)
    retrained(quick)
    make_data(quick, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "settle", stopping(run.settle, "before"))
        with pytest.raises(Stop):
            retrained(quick)
    tracking = compose("retrain", arguments(quick))["tracking"]
    by_hand = register("by hand", checkpoint(SPEC), tracking, "people").version
    settle(tracking, Decision("people", by_hand, 1, True, "by hand"))
    done = retrained(quick)
    assert (done["outcome"], done["champion_before"], done["champion"]) == ("promoted", by_hand, 2)
    assert CALLS["measure"] == 3 and aliases_of(quick)["previous"] == by_hand


def test_asked_to_end_it_goes_on_later_and_that_is_no_failure(quick: Path) -> None:
    make_data(quick, 0)

    def asked(raw: Config) -> Any:
        raise Stopped("asked to end")

    for _ in range(4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workflow, "train", asked)
            with pytest.raises(Stopped):
                retrained(quick)
    assert retrained(quick)["outcome"] == "promoted"


AWAY = (Unavailable("no store"), OSError("no route to host"), ray.exceptions.NodeDiedError("a node died"))


@pytest.mark.parametrize("error", AWAY, ids=lambda error: type(error).__name__)
def test_what_the_infrastructure_did_is_no_attempt(quick: Path, error: Exception) -> None:
    make_data(quick, 0)

    def fails(raw: Config) -> Any:
        raise error

    for _ in range(4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workflow, "train", fails)
            with pytest.raises(type(error)):
                retrained(quick)
    [entry] = Journal(f"{quick}/runs/people.retraining").entries
    assert (entry.stage, entry.failures) == ("begun", 0)
    assert retrained(quick)["outcome"] == "promoted"


def test_what_was_given_up_says_so_every_time(
    quick: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data(quick, 0)
    retrained(quick)
    make_data(quick, 1)

    def diverges(raw: Config) -> Any:
        raise Diverged("the loss is NaN")

    monkeypatch.setattr("sys.argv", ["/jobs/retrain.py", "register_as=people", "data.source.path=/my photos"])
    again = "try again with: python -m jobs.retrain register_as=people 'data.source.path=/my photos' retrain.force=true"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "train", diverges)
        for _ in range(2):
            with pytest.raises(Diverged):
                retrained(quick)
        third = retrained(quick)
    assert (third["outcome"], third["exit_code"]) == ("kept", 3)
    assert "failed 3 times and is given up" in third["reason"] and again in third["reason"]
    for _ in range(2):
        capsys.readouterr()
        later = retrained(quick)
        assert (later["outcome"], later["exit_code"], CALLS["train"]) == ("unchanged", 4, 1)
        said = capsys.readouterr().out
        assert "was given up: its training failed 3 times" in said and again in said and "already" not in said
    assert retrained(quick, "retrain.force=true")["outcome"] == "promoted"
    assert "was given up" not in retrained(quick)["reason"]


def test_without_its_registration_a_training_goes_on_and_that_is_no_attempt(quick: Path) -> None:
    make_data(quick, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "train", lambda raw: {"undelivered": "the store is away", "exit_code": 75})
        with pytest.raises(Unavailable, match="trained but not registered, run again: the store is away"):
            retrained(quick)
    assert retrained(quick)["outcome"] == "promoted"


def test_what_goes_on_with_an_interrupted_retraining_is_its_own_command(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of the training or the registration which was interrupted: who followed that had no champion."""
    make_data(quick, 0)
    monkeypatch.setattr("sys.argv", ["/jobs/retrain.py", "register_as=people", "data.source.path=/my photos"])
    again = "python -m jobs.retrain register_as=people 'data.source.path=/my photos'"

    def undelivered(raw: Config) -> dict[str, Any]:
        return {"undelivered": f"away; later: {registering('/runs/x', raw['tracking'])}", "exit_code": 75}

    def stopped(raw: Config) -> dict[str, Any]:
        raise Stopped(f"stopped; go on with it: {Run('x', '/runs/x', {}, {}, {}).resume}")

    def asked_to_end(*_: Any) -> Decision:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        raise AssertionError("was not stopped")

    for module, name, done, error in (
        (workflow, "train", undelivered, Unavailable),
        (workflow, "train", stopped, Stopped),
        (run, "measure", asked_to_end, Stopped),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, done)
            with pytest.raises(error) as raised:
                retrained(quick)
        assert str(raised.value).endswith(f": {again}") and str(raised.value).count("python -m") == 1
    assert Run("x", "/runs/x", {}, {}, {}).resume == "python -m jobs.train resume=/runs/x"
    assert retrained(quick)["outcome"] == "promoted"


def test_a_decision_is_recorded_once_however_often_it_is_settled(quick: Path) -> None:
    make_data(quick, 0)
    retrained(quick)
    tracking = compose("retrain", arguments(quick))["tracking"]
    version = register("other", checkpoint(SPEC), tracking, "people").version
    decision = Decision("people", version, 1, True, "better", {"low": 0.1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aliases, "_record", stopping(aliases._record, "before"))
        with pytest.raises(Stop):
            settle(tracking, decision, again=True)
    before = tagged(quick, DECISION_TAG)
    for _ in range(2):
        settle(tracking, decision, again=True)
    assert tagged(quick, DECISION_TAG) == before + 1 and aliases_of(quick)["champion"] == version
    with pytest.raises(PipelineError, match="became champion meanwhile"):
        settle(tracking, decision)
