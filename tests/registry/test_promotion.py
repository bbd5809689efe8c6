"""Promotion: measured, recorded, one at a time, and undone by one command."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline import store
from pipeline.config import compose, validate
from pipeline.data.dataset import read_manifest
from pipeline.errors import PipelineError
from pipeline.evaluation.seen import trained_classes
from pipeline.model import build_model
from pipeline.registry import aliases, locks
from pipeline.registry import promotion as registry_promotion
from pipeline.registry.aliases import Decision, alias_version, promotion_lock, roll_back, settle
from pipeline.registry.promotion import KEPT, PromoteConfig, decide, promote_job
from pipeline.registry.versions import register, register_run, set_alias
from pipeline.retraining.config import settings_of
from pipeline.training.checkpoint import Checkpoint
from tests.evaluation.test_seen import split_anew
from tests.registry.conftest import SPEC, add_checkpoint

LOCK = "people.promotion-lock"


@pytest.fixture
def client(run: Path, tracking: dict) -> MlflowClient:
    """Three versions of "people", of which the first is champion."""
    for seed in (0, 1, 2):
        add_checkpoint(run, 8, seed=seed)
        register_run(str(run), tracking)
    set_alias(tracking, "people", "champion", 1)
    return MlflowClient(tracking_uri=tracking["uri"])


def aliases_of(client: MlflowClient) -> dict[str, int]:
    return {name: int(version) for name, version in client.get_registered_model("people").aliases.items()}


def test_a_promotion_moves_both_aliases_and_is_recorded(client, tracking):
    figures = {"difference": 0.02, "low": 0.01, "high": 0.03, "episodes": 1000}
    settle(tracking, Decision("people", 2, 1, True, "better", figures))
    assert aliases_of(client) == {"champion": 2, "previous": 1}
    tag = json.loads(client.get_model_version("people", "2").tags[aliases.DECISION_TAG])
    assert tag["promoted"] and tag["champion"] == 1 and tag["figures"] == figures
    [run] = client.search_runs([client.get_experiment_by_name("tests").experiment_id], "tags.promoted = 'true'")
    assert run.data.metrics == {"difference": 0.02, "low": 0.01, "high": 0.03} and run.info.status == "FINISHED"
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["decision.json"]
    assert [model.name for model in client.search_registered_models()] == ["people"]  # no lock is left


def test_a_refused_challenger_changes_no_alias_and_is_recorded(client, tracking):
    settle(tracking, Decision("people", 2, 1, False, "not better", {"low": -0.1}))
    assert aliases_of(client) == {"champion": 1}
    assert not json.loads(client.get_model_version("people", "2").tags[aliases.DECISION_TAG])["promoted"]


def test_back_and_forth(client, tracking):
    with pytest.raises(PipelineError, match="no previous champion"):
        roll_back(tracking, "people")
    settle(tracking, Decision("people", 3, 1, True, "better"))
    assert roll_back(tracking, "people").challenger == 1
    assert aliases_of(client) == {"champion": 1, "previous": 3}
    roll_back(tracking, "people")
    assert aliases_of(client) == {"champion": 3, "previous": 1}


def test_a_rollback_that_is_cut_off_has_brought_the_previous_champion_back(client, tracking, monkeypatch):
    settle(tracking, Decision("people", 3, 1, True, "better"))
    moved, calls = MlflowClient.set_registered_model_alias, []

    def away(*args: str) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise MlflowException("away")
        moved(*args)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", away)
    with pytest.raises(PipelineError, match="look which version of 'people' is @champion"):
        roll_back(tracking, "people")
    assert aliases_of(client)["champion"] == 1


def test_of_two_at_once_one_wins(client, tracking):
    """Both were measured against version 1; whoever comes second is refused, whatever the order."""
    outcome: dict[int, str] = {}

    def attempt(version: int) -> None:
        try:
            settle(tracking, Decision("people", version, 1, True, "better"))
            outcome[version] = "won"
        except PipelineError as error:
            outcome[version] = str(error)

    threads = [threading.Thread(target=attempt, args=(version,)) for version in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner, loser = sorted(outcome, key=lambda version: outcome[version] != "won")
    assert outcome[winner] == "won" and f"version {winner} of 'people' became champion meanwhile" in outcome[loser]
    assert aliases_of(client) == {"champion": winner, "previous": 1}


TEN = """
import sys
from pipeline.errors import PipelineError
from pipeline.registry.aliases import Decision, settle
tracking = {"uri": sys.argv[1], "artifacts": sys.argv[2], "experiment": "tests", "timeout": 30}
for champion in (1, 2, 3):
    sys.stdin.readline()
    try:
        settle(tracking, Decision("people", champion + 1, champion, True, "better"), lock_wait=120)
        print("won", flush=True)
    except PipelineError as error:
        print(error, flush=True)
"""


def test_of_ten_processes_at_once_one_wins_and_the_others_say_why(client, run, tracking):
    """Three rounds: each time one moves the champion, and nine find that it is another one now."""
    add_checkpoint(run, 8, seed=3)
    register_run(str(run), tracking)
    command = [sys.executable, "-c", TEN, tracking["uri"], tracking["artifacts"]]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) for _ in range(10)]
    for champion in (1, 2, 3):
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.stdout.readline().strip() for process in processes]
        assert said.count("won") == 1, said
        lost = f"version {champion + 1} of 'people' became champion meanwhile"
        assert all(line == "won" or line.startswith(lost) for line in said), said
    for process in processes:
        process.communicate(timeout=60)
    assert aliases_of(client) == {"champion": 4, "previous": 3}
    assert [model.name for model in client.search_registered_models()] == ["people"]
    assert {experiment.name for experiment in client.search_experiments()} == {"Default", "tests"}


def hold(client: MlflowClient, owner: str, alive: float) -> str:
    """A lock as somebody else would have it."""
    return client.create_experiment(LOCK, tags={locks.OWNER: owner, locks.BEAT: str(alive)})


def test_a_held_lock_is_waited_for_and_a_dead_one_is_broken(client, tracking):
    hold(client, "elsewhere 1", time.time())
    with pytest.raises(PipelineError, match=r"another promotion of 'people' is under way, on elsewhere in process 1"):
        settle(tracking, Decision("people", 2, 1, True, "better"), lock_wait=0.5)
    assert aliases_of(client) == {"champion": 1}
    client.set_experiment_tag(client.get_experiment_by_name(LOCK).experiment_id, locks.BEAT, "0")
    settle(tracking, Decision("people", 2, 1, True, "better"))
    assert aliases_of(client)["champion"] == 2


def test_a_lock_that_was_deleted_by_hand_is_free(client, tracking):
    client.delete_experiment(hold(client, "elsewhere 1", time.time()))
    settle(tracking, Decision("people", 2, 1, True, "better"), lock_wait=5)
    assert aliases_of(client)["champion"] == 2


def test_of_many_who_find_a_dead_holder_none_removes_its_successor(client):
    """Both have seen the dead one; the first has the lock by the time the second removes what it saw."""
    seen = hold(client, "elsewhere 1", 0.0)
    with locks.locked(client, LOCK, 60.0, wait=5.0) as is_held:
        locks._remove(client, LOCK, seen)
        assert is_held()
    assert client.get_experiment_by_name(LOCK) is None


def test_whoever_lost_the_lock_moves_nothing_and_leaves_the_new_holder_alone(client, tracking):
    says = pytest.raises(PipelineError, match="took so long that another one went on")
    with says, promotion_lock(client, "people") as still_held:
        locks._remove(client, LOCK, locks.holder_of(client, LOCK).number)
        hold(client, "another 1", time.time())
        still_held()
    assert locks.holder_of(client, LOCK).machine == "another"


def test_a_promotion_that_comes_too_late_never_says_that_it_won(monkeypatch, tracking, client, capsys):
    def overtaken(config: PromoteConfig, challenger: int, champion: int | None) -> Decision:
        set_alias(tracking, "people", "champion", 3)
        return Decision("people", challenger, champion, True, "better")

    monkeypatch.setattr(registry_promotion, "measure", overtaken)
    with pytest.raises(PipelineError, match="version 3 of 'people' became champion meanwhile"):
        promote_job(config(tracking, "challenger=2"))
    assert "becomes champion" not in capsys.readouterr().out


def config(tracking: dict, *overrides: str) -> dict:
    given = [f"tracking.{key}={value}" for key, value in tracking.items()]
    return compose("promote", ["name=people", *given, *overrides])


def test_one_episode_alone_decides_nothing():
    with pytest.raises(PipelineError, match="episodes=1: .*greater than or equal to 2"):
        validate(PromoteConfig, compose("promote", ["name=people", "episodes=1"]))


def test_the_rule():
    """Promoted only if the whole paired interval lies above the margin; the figures are scipy's."""
    from scipy import stats

    rng = np.random.default_rng(0)
    champion = rng.normal(0.6, 0.1, 400)
    challenger = champion + rng.normal(0.02, 0.05, 400)
    raw = compose("promote", ["name=people", "episodes=400"])
    found = decide(validate(PromoteConfig, raw), 2, 1, [challenger, champion], "somewhere")
    expected = stats.ttest_rel(challenger, champion).confidence_interval(0.95)
    assert found.promoted and found.figures["low"] == pytest.approx(expected.low)
    assert found.figures["high"] == pytest.approx(expected.high)
    for margin, promoted in ((expected.low - 1e-6, True), (expected.low + 1e-6, False)):
        raw = compose("promote", ["name=people", f"margin={margin}"])
        assert decide(validate(PromoteConfig, raw), 2, 1, [challenger, champion], "").promoted == promoted
    assert decide(validate(PromoteConfig, raw), 2, None, [champion], "").promoted  # there was none


def test_a_version_that_was_trained_on_more_splits_does_not_win_by_them(tracking, glyphs, monkeypatch):
    """One of train+val, as a paper's last training, beside one of train alone, on the same dataset."""
    manifest, weights = read_manifest(glyphs), dict(build_model(SPEC).state_dict())
    for number, split in enumerate(["train", "train+val"]):
        origin = {"name": "glyphs", "fingerprint": manifest.fingerprint, "uri": glyphs, "split": split}
        dataset = {**origin, "trained": trained_classes(manifest, split)}
        register(f"run-{number}", Checkpoint(number, SPEC, {}, dataset, {}, [], weights), tracking, "people")
    set_alias(tracking, "people", "champion", 1)

    def started(cluster: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(registry_promotion, "start_ray", started)
    says = "^challenger, version 2 was trained on 40 classes of split 'val'.*seen=true"
    with pytest.raises(PipelineError, match=says):
        promote_job(config(tracking, "challenger=2", "split=val"))
    for allowed in (["split=test"], ["split=val", "seen=true"]):
        with pytest.raises(InterruptedError):
            promote_job(config(tracking, "challenger=2", *allowed))


def test_neither_version_is_measured_on_classes_that_it_was_trained_on(tracking, glyphs, tmp_path, monkeypatch):
    """The dataset was split anew between the two trainings; whoever knows it says so, as a retraining does."""
    before, moved = read_manifest(glyphs), split_anew(read_manifest(glyphs))
    store.write_bytes(f"{tmp_path}/anew/manifest.json", moved.to_json().encode())
    weights = dict(build_model(SPEC).state_dict())
    for number, (manifest, uri) in enumerate([(before, glyphs), (moved, f"{tmp_path}/anew")]):
        trained = trained_classes(manifest, "train")
        dataset = {"name": "glyphs", "fingerprint": manifest.fingerprint, "uri": uri, "trained": trained}
        register(f"run-{number}", Checkpoint(number, SPEC, {}, dataset, {}, [], weights), tracking, "people")
    set_alias(tracking, "people", "champion", 1)

    def started(cluster: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(registry_promotion, "start_ray", started)  # what follows is of the measurement
    says = r"^champion, version 1 was trained on 1 classes of split 'test' of dataset 'glyphs': 'glyph0059'.*seen=true"
    with pytest.raises(PipelineError, match=says):
        promote_job(config(tracking, "challenger=2"))
    with pytest.raises(InterruptedError):
        promote_job(config(tracking, "challenger=2", "seen=true"))
    with pytest.raises(InterruptedError):
        promote_job(config(tracking, "challenger=2", f"dataset={glyphs}"))  # nothing in its test split was trained on
    raw = compose("retrain", ["data=folder", "data.source.path=images", "register_as=people"])
    raw["data"] |= {"root": str(tmp_path), "name": "anew"}
    raw["tracking"] |= tracking
    with pytest.raises(InterruptedError):  # it asks before it trains, and then ends in a decision
        registry_promotion.measure(settings_of(raw).promotion(2, f"{tmp_path}/anew"), 2, 1)
    assert aliases_of(MlflowClient(tracking_uri=tracking["uri"])) == {"champion": 1}


def test_the_job(ray_session, tracking, glyphs, capsys):
    """A trained network replaces an untrained one, is not replaced by it, and rolling back is one command."""
    spec = {
        "method": {"name": "prototypical"}, "backbone": {"name": "conv4", "width": 8},
        "input": {"shape": [1, 28, 28], "scaling": "unit"}, "way": 5, "classes": 60,
    }  # fmt: skip
    torch.manual_seed(0)
    good = dict(build_model(spec).state_dict())
    bad = {key: torch.zeros_like(value) if "convs" in key else value for key, value in good.items()}
    raw, dataset = {"tracking": {}, "storage": "", "seed": 0}, {"name": "glyphs", "fingerprint": "f", "uri": glyphs}
    for number, weights in enumerate((bad, good, bad)):
        checkpoint = Checkpoint(number, spec, raw, dataset, {}, [], weights)
        register(f"run-{number}", checkpoint, tracking, "people")
    small = ["episodes=40", "query=5"]
    first = promote_job(config(tracking, "challenger=1", *small))
    assert first["promoted"] and first["champion_before"] is None and first["exit_code"] == 0
    set_alias(tracking, "people", "challenger", 2)
    second = promote_job(config(tracking, *small))
    assert (
        second["promoted"] and second["low"] > 0 and second["accuracy.challenger"] > second["accuracy.champion"] + 0.2
    )
    third = promote_job(config(tracking, "challenger=3", *small))
    assert not third["promoted"] and third["exit_code"] == KEPT and third["high"] < 0
    assert promote_job(config(tracking, *small))["reason"] == "is champion already"
    client = MlflowClient(tracking_uri=tracking["uri"])
    assert aliases_of(client) == {"champion": 2, "previous": 1, "challenger": 2}
    assert (
        promote_job(config(tracking, "rollback=true"))["version"] == 1
        and alias_version(client, "people", "previous") == 2
    )
    assert "becomes champion" in capsys.readouterr().out
    for overrides, says in (
        (["challenger=nobody"], "has no such version or alias"),
        (["challenger=²"], "has no such version or alias"),
        (["challenger=3", "way=500"], "way=500"),
    ):
        with pytest.raises(PipelineError, match=says):
            promote_job(config(tracking, *overrides))
    with pytest.raises(PipelineError, match="there is no registered model 'nobody'; there is people"):
        promote_job(config(tracking, "name=nobody"))
