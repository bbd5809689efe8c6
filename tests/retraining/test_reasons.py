"""When a challenger is due, under which name, and what is refused; without Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.config import compose, help_text
from pipeline.data.dataset import read_manifest
from pipeline.data.write import write_dataset
from pipeline.errors import PipelineError
from pipeline.registry import locks
from pipeline.retraining.champion import Champion, keep_classes, refuse_seen_classes
from pipeline.retraining.config import Settings, settings_of
from pipeline.retraining.journal import Entry, Journal
from pipeline.retraining.run import CODES, Busy, _training, lease
from pipeline.retraining.trigger import DAY, find_work
from tests.data.test_write import some_classes
from tests.retraining.conftest import arguments

NOW = 1_800_000_000.0
LOCK = "people.retraining-lock"
OLD, NEW = "a" * 64, "b" * 64


def settings(home: Path, *more: str) -> Settings:
    return settings_of(compose("retrain", arguments(home, *more)))


def champion(fingerprint: str | None = OLD, days: float = 0, version: int = 1) -> Champion:
    return Champion("people", version, NOW - days * DAY, fingerprint)


def due(found: Settings, journal: Journal, *args: Any, days: float = 0) -> Entry | None:
    return find_work(found, journal, *args, now=NOW + days * DAY)


def finished(journal: Journal, entry: Entry | None, outcome: Any = "kept") -> Entry:
    assert entry is not None
    return journal.put(replace(entry, stage="done", outcome=outcome, ended=entry.began))


def test_the_same_reason_is_the_same_work_and_is_done_once(tmp_path: Path) -> None:
    found, journal = settings(tmp_path), Journal(f"{tmp_path}/journal")
    assert due(found, journal, champion(OLD), OLD) is None
    first = due(found, journal, champion(OLD), NEW)
    assert first is not None and first == due(found, journal, champion(OLD), NEW)
    assert "champion 1 was trained on data aaaaaaaaaaaa; now they are bbbbbbbbbbbb" in first.reasons
    again = due(found, journal, champion(OLD), NEW, days=1)
    assert again is not None and again.run == first.run
    finished(journal, first)
    assert due(found, Journal(f"{tmp_path}/journal"), champion(OLD), NEW) is None  # it lost: it is not tried again
    for other in (
        due(found, journal, champion(OLD), "c" * 64),
        due(found, journal, champion(OLD, version=2), NEW),
        due(settings(tmp_path, "steps=9"), journal, champion(OLD), NEW),
    ):
        assert other is not None and other.run != first.run and other.seed == 0
    same = settings(tmp_path, "cluster.workers=2", "tracking.timeout=7")  # where it runs is no part of it
    assert due(same, journal, champion(OLD), NEW) is None
    assert due(found, journal, champion(None), OLD) is not None  # a champion that does not say


def test_one_that_was_given_up_does_not_count(tmp_path: Path) -> None:
    found, journal = settings(tmp_path), Journal(f"{tmp_path}/journal")
    first = finished(journal, due(found, journal, champion(OLD), NEW), "superseded")
    again = due(found, journal, champion(OLD), NEW)
    assert again is not None and again.run == first.run


def test_no_champion(tmp_path: Path) -> None:
    found, journal = settings(tmp_path), Journal(f"{tmp_path}/journal")
    first = due(found, journal, None, NEW)
    assert first is not None and first.reasons == ("there is no champion",) and first.champion is None
    finished(journal, first)
    assert due(found, journal, None, NEW) is None and due(found, journal, None, OLD) is not None


def test_age_counts_from_the_champion_and_from_the_last_attempt(tmp_path: Path) -> None:
    found, journal = settings(tmp_path, "retrain.max_age_days=7"), Journal(f"{tmp_path}/journal")
    assert due(found, journal, champion(NEW, days=6.9), NEW) is None
    first = due(found, journal, champion(NEW, days=7.1), NEW)
    assert first is not None and first.number == 0 and "older than 7 days" in first.reasons[0]
    finished(journal, first)
    assert due(found, journal, champion(NEW, days=7.1), NEW, days=6) is None
    second = due(found, journal, champion(NEW, days=7.1), NEW, days=8)
    assert second is not None and second.number == 1 and second.seed == first.seed + 1 and second.run != first.run


def test_force(tmp_path: Path) -> None:
    always, journal = settings(tmp_path, "retrain.force=true"), Journal(f"{tmp_path}/journal")
    first = finished(journal, due(always, journal, champion(NEW), NEW))
    second = due(always, journal, champion(NEW), NEW)
    assert second is not None and second.run != first.run and second.reasons == ("forced",)
    for word in ("2027-01-01", "20270101"):
        once = settings(tmp_path, f"retrain.force={word}")
        entry = finished(journal, due(once, journal, champion(NEW), NEW))
        assert entry.reasons == (f"forced: {word}",) and due(once, journal, champion(NEW), NEW) is None


def test_a_word_is_used_up_by_a_decision_not_by_what_was_interrupted_and_given_up(tmp_path: Path) -> None:
    once, journal = settings(tmp_path, "retrain.force=2024-11-28"), Journal(f"{tmp_path}/journal")
    finished(journal, due(once, journal, champion(NEW), NEW), "superseded")
    changed = settings(tmp_path, "retrain.force=2024-11-28", "steps=9")
    for one in (once, changed):
        entry = due(one, journal, champion(NEW), NEW)
        assert entry is not None and entry.reasons == ("forced: 2024-11-28",)
    finished(journal, due(changed, journal, champion(NEW), NEW))
    assert due(once, journal, champion(NEW), NEW) is None and due(changed, journal, champion(NEW), NEW) is None


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("name=mine", "name=mine: a retraining names its runs itself"),
        ("resume=mine", "resume=mine: the same command goes on with it"),
        ("initial=somewhere", "retrain.start=warm"),
        ("register_as=null", "register_as must be given"),
        ("tracking.uri=null", "champions live in an MLflow store"),
        ("retrain.start=lukewarm", "retrain.start='lukewarm'"),
        ("retrain.max_age_days=0", "retrain.max_age_days=0"),
        ("retrain.promotion.confidence=1.5", "retrain.promotion.confidence=1.5"),
        ("retrain.promotion.marginn=1", "did you mean 'retrain.promotion.margin'"),
        ("retrain.forse=true", "did you mean 'retrain.force'"),
    ],
)
def test_wrong_keys_are_refused_in_one_line(tmp_path: Path, argument: str, says: str) -> None:
    with pytest.raises(PipelineError) as refusal:
        settings(tmp_path, argument)
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_help_names_every_exit_code_and_key(tmp_path: Path) -> None:
    text = help_text("retrain")
    for code in {*CODES.values(), 2, 1}:
        assert f" {code}: " in text
    for line in text.split("\nretrain: ")[1].splitlines():
        assert not line.strip() or "#" in line, line


def test_a_champion_s_weights_are_not_measured_as_untrained(tmp_path: Path) -> None:
    """The first retraining has a network without training to show; a warm start has none."""
    found = settings(tmp_path)
    found = replace(found, raw={**found.raw, "evaluation": {"untrained": True}})
    entry = due(found, Journal(found.uri), None, "1" * 64)
    assert entry is not None and _training(found, entry)["evaluation"]["untrained"]
    assert not _training(found, replace(entry, initial="champion-1"))["evaluation"]["untrained"]


def test_a_contest_has_the_ways_of_a_method_that_has_no_others(tmp_path: Path, glyphs: str) -> None:
    manifest = read_manifest(glyphs)
    asked = ("method=snail", "backbone.width=4", "train.way=4")
    settings(tmp_path, *asked, "retrain.promotion.way=4").check_promotion(manifest, manifest)
    with pytest.raises(PipelineError, match=r"retrain.promotion.way=3: snail trained with 4 ways .* set .*way=4"):
        settings(tmp_path, *asked, "retrain.promotion.way=3").check_promotion(manifest, manifest)
    settings(tmp_path, "retrain.promotion.way=3").check_promotion(manifest, manifest)


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal.json").write_text('{"schema": 1, "entries": [{}]}')
    with pytest.raises(PipelineError, match=r"journal.json is damaged"):
        Journal(str(tmp_path))
    (tmp_path / "journal.json").write_text('{"schema": 2, "entries": []}')
    with pytest.raises(PipelineError, match="schema 2; this code reads 1"):
        Journal(str(tmp_path))


def test_a_champion_is_not_measured_on_what_it_was_trained_on(tmp_path: Path) -> None:
    def dataset(name: str, splits: dict[str, list[str]]) -> Any:
        return write_dataset(f"{tmp_path}/{name}", name, some_classes().items(), splits)

    before = dataset("before", {"train": ["a", "c"], "val": ["b"], "test": ["d"]})
    moved = dataset("moved", {"train": ["a", "d"], "val": ["b"], "test": ["c"]})
    more = dataset("more", {"train": ["a"], "val": ["c"], "test": ["d", "b"]})
    keep_classes(str(tmp_path), before)
    old = champion(before.fingerprint)
    with pytest.raises(PipelineError, match=r"1 classes of split 'test', such as 'c', were in training"):
        refuse_seen_classes(str(tmp_path), old, moved, "train", "test")
    refuse_seen_classes(str(tmp_path), old, more, "train", "test")
    refuse_seen_classes(str(tmp_path), champion("f" * 64), moved, "train", "test")  # nothing is known


@pytest.fixture
def tracking(tmp_path: Path, empty_database: Path) -> dict[str, Any]:
    import shutil

    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return {"uri": f"sqlite:///{tmp_path}/mlflow.db", "artifacts": None, "experiment": "tests", "timeout": 5}


HOLDER = """
import os, signal, sys
from pipeline.retraining.run import lease
with lease({"uri": sys.argv[1], "artifacts": None, "experiment": "tests", "timeout": 5}, "people", 300):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_of_two_at_once_one_refuses_and_a_dead_one_is_not_waited_for(tracking: dict[str, Any], tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=tracking["uri"])
    with lease(tracking, "people", 300) as still_held:
        still_held()
        with pytest.raises(Busy, match=rf"under way, on \S+ in process {os.getpid()}"), lease(tracking, "people", 300):
            pass
        with lease(tracking, "others", 300):
            pass
    assert client.search_registered_models() == []
    assert [experiment.name for experiment in client.search_experiments()] == ["tests", "Default"]

    killed = subprocess.run([sys.executable, "-c", HOLDER, tracking["uri"]], cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -9 and locks.holder_of(client, LOCK) is not None
    with lease(tracking, "people", 300):  # on this machine a process that ended is known to be dead
        pass
    client.create_experiment(LOCK, tags={locks.OWNER: "elsewhere 1", locks.BEAT: str(time.time())})
    with pytest.raises(Busy, match="on elsewhere in process 1"), lease(tracking, "people", 300):
        pass
    with lease(tracking, "people", 0.01):  # silent for longer
        pass


def test_a_lease_gives_signs_of_life_and_notices_that_it_was_taken(
    tracking: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(tracking_uri=tracking["uri"])
    beaten = threading.Event()
    monkeypatch.setattr(locks.MlflowClient, "set_experiment_tag", lambda *args: beaten.set())
    says = pytest.raises(Busy, match="took over")
    with says, lease(tracking, "people", 0.5) as still_held:
        assert beaten.wait(20)
        locks._remove(client, LOCK, locks.holder_of(client, LOCK).number)
        client.create_experiment(LOCK, tags={locks.OWNER: "another 1", locks.BEAT: str(time.time())})
        still_held()
    assert locks.holder_of(client, LOCK).machine == "another"
