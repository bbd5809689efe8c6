"""Campaigns on a real cluster: trials that fail, and a driver that is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from jobs._main import TERMINATED
from pipeline.config import compose, validate
from pipeline.registry.tracking import RUN_TAG
from pipeline.search.arguments import translate
from pipeline.search.asha import ASHA
from pipeline.search.ledger import Ledger
from pipeline.search.run import tune
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.config import TrainConfig
from pipeline.training.runs import best_checkpoint, checkpoints, read_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("workers", [1, 2])
def test_one_trial_diverges_one_is_stopped_and_the_best_is_registered(
    ray_session, arguments, tmp_path, monkeypatch, workers
):
    """Trials share the cluster, and give back what they had; the winner is repeated with another seed."""
    monkeypatch.setattr(ASHA, "goes_on", lambda self, number, run, step, accuracy: number != 2 or step > 6)
    place = [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", f"tracking.artifacts={tmp_path}/artifacts"]
    given = [a for a in arguments("trials=3", "finalists={count: 1, seeds: 1}") if a != "tracking=none"]
    given = [*(a for a in given if "cluster.workers" not in a), f"base.cluster.workers={workers}"]
    raw = compose("tune", translate([*given, *place]))
    raw["space"] = {"optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True}}
    raw["first"] = [{}, {"optimizer.lr": 1e30}, {"optimizer.lr": 1e-2}]
    found = tune(raw)
    assert found["exit_code"] == 0
    assert _free_cpus(ray_session) == ray_session.cluster_resources()["CPU"], "a trial that was stopped kept its cores"
    trials = {(trial["number"], trial["seed"]): trial for trial in found["trials"]}
    assert trials[1, None]["status"] == "failed" and trials[1, None]["reason"].startswith("the loss is")
    assert trials[0, None]["status"] == "finished" and trials[0, None]["steps"] == 12
    assert trials[2, None]["status"] == "stopped" and trials[2, None]["reason"] == "not among the best at step 6"
    assert trials[2, None]["steps"] == 6 and 0 <= trials[2, None]["accuracy"] <= 1
    assert set(trials) == {(0, None), (1, None), (2, None), (0, 1)} and trials[0, 1]["status"] == "finished"
    run = read_run(f"{found['folder']}/{trials[0, None]['run']}")
    assert run.config["evaluation"] is None and len(checkpoints(run.uri)) >= 1
    whole = compose("train", [f"config={found['best']['config']}"])
    assert validate(TrainConfig, whole).optimizer["lr"] == found["best"]["values"]["optimizer.lr"]
    assert best_checkpoint(f"{found['folder']}/{found['best']['run']}")
    names = {path.name for path in Path(found["folder"], "plots").iterdir()}
    assert {"accuracy_over_optimizer.lr.svg", "parallel_coordinates.svg", "trials_over_time.svg"} <= names

    client = MlflowClient(tracking_uri=place[0].partition("=")[2])
    [experiment] = [e for e in client.search_experiments() if e.name == raw["tracking"]["experiment"]]
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == found["mlflow_run"]]
    assert len(runs) == len(children) + 1 and len(children) == len(found["trials"])
    assert {r.data.tags[RUN_TAG] for r in children} == {trial["run"] for trial in found["trials"]}
    [failed] = [r for r in children if r.data.tags["trial.status"] == "failed"]
    assert failed.info.status == "FAILED" and "the loss is" in failed.data.tags["trial.reason"]
    assert {item.path for item in client.list_artifacts(found["mlflow_run"])} >= {"best.yaml", "space.yaml", "plots"}
    version = client.get_model_version_by_alias(found["name"], "challenger")
    assert version.tags[RUN_TAG] == found["best"]["run"]


def test_a_search_whose_space_is_used_up_ends_and_says_so(ray_session, arguments, capsys):
    raw = compose("tune", translate(arguments("trials=9", "finalists={count: 0, seeds: 0}", "base.steps=6")))
    raw["space"] = {"method.distance": {"choices": ["cosine", "squared_euclidean"]}}
    raw["first"] = [{}]
    found = tune(raw)
    assert found["exit_code"] == 0 and found["finished"] == 2
    assert "no more than 2 of 9 trials: the space has no other values" in capsys.readouterr().out


def test_a_population_trains_on_with_other_values(ray_session, arguments):
    """Members are stopped and gone on with; a copy begins at its parent's step, with a rate of its own."""
    given = arguments(
        "trials=3", "finalists={count: 0, seeds: 0}", "scheduler.kind=pbt", "scheduler.grace=6", "base.steps=18",
        "base.optimizer=sgd",
    )  # fmt: skip
    raw = compose("tune", translate(given))
    raw["space"] = {"optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True}}
    raw["first"] = [{}]
    found = tune(raw)
    assert found["exit_code"] == 0
    records = Ledger(found["folder"]).search
    copies = [record for record in records if record.parent]
    assert [record.began_at for record in copies] == [6, 12] and len(records) == 5
    assert sorted(record.status for record in records) == ["finished"] * 3 + ["stopped"] * 2
    for record in copies:
        run = read_run(f"{found['folder']}/{record.run}")
        assert run.config["optimizer"]["lr"] == record.values["optimizer.lr"]
        state = load_checkpoint(checkpoints(run.uri)[-1])
        steps = [entry["step"] for entry in state.history if "train/loss" in entry]
        assert steps == sorted(set(steps)) and steps[0] == 3  # what the parent did, and what came after
        begun = load_checkpoint(f"{run.uri}/start")
        assert begun.step == record.began_at and state.step > begun.step
        assert [group["base_lr"] for group in state.groups] == [record.values["optimizer.lr"]] * len(state.groups)


@pytest.mark.timeout(1800)  # five jobs, of ten trials in all
def test_a_killed_campaign_is_resumed(arguments, tmp_path):
    """The job is killed in mid-campaign; resumed, it is asked to end, and resumed again it finds what an untouched
    one finds, and repeats nothing."""
    given = [
        *arguments("trials=4", "finalists={count: 0, seeds: 0}", "concurrent=1", "search.startup=1"),
        "base.steps=24", "base.cluster.object_store_mb=150",
    ]  # fmt: skip
    given = [argument for argument in given if argument not in ("name=small", "base.steps=12")]

    def start(*more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.tune", "--json", *more],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    def finish(process: subprocess.Popen) -> dict:
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err.decode()[-3000:]
        return json.loads(out)

    untouched = finish(start(*given, "name=untouched"))
    victim = start(*given, "name=killed")
    folder = f"{tmp_path}/runs/killed"
    while not (_finished(folder) and checkpoints(f"{folder}/killed-{len(Ledger(folder).search) - 1:04d}")):
        assert victim.poll() is None, victim.stderr.read().decode()[-3000:]
        time.sleep(0.05)
    for process in [*psutil.Process(victim.pid).children(recursive=True), psutil.Process(victim.pid)]:
        process.kill()
    victim.wait()
    before = {record.run: record for record in Ledger(folder).search if record.status != "running"}
    written = {run: _written(f"{folder}/{run}") for run in before}
    assert 1 <= len(before) < 4

    place = f"storage={tmp_path}/runs"
    leaving = start("resume=killed", place)
    while not len([record for record in Ledger(folder).search if record.status == "finished"]) > len(before):
        assert leaving.poll() is None, leaving.stderr.read().decode()[-3000:]
        time.sleep(0.05)
    leaving.terminate()
    out, err = leaving.communicate(timeout=300)
    assert (leaving.returncode, out) == (TERMINATED, b"")
    assert f"stopped as asked; go on with it: python -m jobs.tune resume=killed {place}" in err.decode()

    resumed = finish(start("resume=killed", place))
    after = {record.run: record for record in Ledger(folder).search}
    assert all(after[run] == record for run, record in before.items())
    assert all(_written(f"{folder}/{run}") == times for run, times in written.items())
    keys = ("number", "values", "status", "steps", "accuracy")
    assert [[t[k] for k in keys] for t in resumed["trials"]] == [[t[k] for k in keys] for t in untouched["trials"]]
    assert resumed["best"]["values"] == untouched["best"]["values"]
    assert resumed["best"]["number"] == untouched["best"]["number"]
    again = finish(start("resume=killed", place))
    assert again["best"] == resumed["best"] and again["trials"] == resumed["trials"]


def _free_cpus(ray) -> float:
    """Once the processes of the last trial have gone."""
    for _ in range(300):
        if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            break
        time.sleep(0.1)
    return ray.available_resources()["CPU"]


def _finished(folder: str) -> bool:
    return any(record.status == "finished" for record in Ledger(folder).search)


def _written(folder: str) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in Path(folder).rglob("*") if path.is_file()}
