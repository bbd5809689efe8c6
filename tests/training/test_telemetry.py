"""Metrics of a run: what they say, what happens without Ray, and that they never break a training."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

import pytest
import ray

from pipeline.training import telemetry
from pipeline.training.launch import ask_to_leave, launch
from pipeline.training.preemption import stopping_on_sigterm
from pipeline.training.prepare import prepare
from pipeline.training.runs import Run
from pipeline.training.telemetry import GAUGES, RESTARTS, Restarts, Telemetry
from tests.metrics import exported, wait_for

ENTRY = {
    "step": 50, "train/steps_per_s": 4.0, "train/episodes_per_s": 16.0, "train/wait_share": 0.01, "train/loss": 0.5,
    "train/lr": 1e-3,
}  # fmt: skip


def test_without_ray_nothing_happens(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(telemetry, "_gauge", None)  # calling it would raise
    seen = []
    Telemetry("r", "m", "d", 10).beside(seen.append)(ENTRY)
    assert seen == [ENTRY]


def test_a_metric_that_cannot_be_set_is_said_once_and_training_goes_on(monkeypatch, caplog):
    def broken(name, meaning):
        raise RuntimeError("no agent")

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(telemetry, "_gauge", broken)
    telemetry._complain.cache_clear()
    seen = []
    both = Telemetry("r", "m", "d", 10).beside(seen.append)
    both(ENTRY)
    both(ENTRY)
    assert len(seen) == 2
    assert [r.getMessage() for r in caplog.records] == ["metrics are not exported: RuntimeError: no agent"]


def test_every_logged_figure_has_its_value(monkeypatch):
    values = {}

    class Gauge:
        def __init__(self, name):
            self.name = name

        def set(self, value, tags):
            values[self.name] = (value, tags)

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(telemetry, "_gauge", lambda name, meaning: Gauge(name))
    told = Telemetry("r", "maml", "glyphs", 100, step=40)
    tags = {"run": "r", "method": "maml", "dataset": "glyphs"}
    assert values["pipeline_step"] == (40, tags)  # before the first step that is logged: a run may never come so far
    told(ENTRY)
    told({"step": 50, "val/accuracy": 0.9, "val/interval": 0.01})
    told({"step": 50, telemetry.CHECKPOINT_SECONDS: 2.0})
    assert {name: value for name, (value, _) in values.items()} == {
        "pipeline_step": 50, "pipeline_steps": 100, "pipeline_episodes_per_second": 16.0, "pipeline_step_seconds": 0.25,
        "pipeline_data_wait_share": 0.01, "pipeline_loss": 0.5, "pipeline_validation_accuracy": 0.9,
        "pipeline_validation_interval": 0.01, "pipeline_checkpoint_seconds": 2.0, "pipeline_restarts": 0.0,
    }  # fmt: skip
    assert all(found == tags for _, found in values.values())


def test_what_is_said_once_is_set_again_until_the_run_ends(monkeypatch):
    """Ray stops exporting what has not been set for half a minute."""
    counts: Counter[str] = Counter()

    class Gauge:
        def __init__(self, name):
            self.name = name

        def set(self, value, tags):
            counts[self.name] += 1

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(telemetry, "_gauge", lambda name, meaning: Gauge(name))
    monkeypatch.setattr(telemetry, "AGAIN_S", 0.01)
    with Telemetry("r", "maml", "glyphs", 100) as told:
        told({"step": 50, "val/accuracy": 0.9})
        wait_for(lambda: counts["pipeline_steps"] > 3 and counts["pipeline_validation_accuracy"] > 3, 30)
    ended = counts.copy()
    assert not told._thread.is_alive() and counts == ended


def test_lost_workers_are_counted_at_the_step_of_the_last_checkpoint():
    told = []

    class Monitor:
        class log:
            remote = told.append

    lost = Restarts(Monitor)
    lost.after_exception(None, {0: RuntimeError()})
    lost.after_report(None, [{"step": 40}, {"step": 40}], None)
    lost.after_exception(None, {1: RuntimeError()})
    assert told == [{"step": 0, RESTARTS: 1}, {"step": 40, RESTARTS: 2}]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_exports_them_all_and_a_lost_worker_is_counted(ray_session, small_run):
    from .test_ray import kill_a_worker_after

    config, _, run = prepare(small_run("prototypical", "name=measured", "steps=60", "checkpoint.keep=9"))
    thread = kill_a_worker_after(run.uri, 1)
    entries = []
    launch(config, run, entries.append)
    assert not thread.is_alive(), "the worker was never killed"
    assert [entry[RESTARTS] for entry in entries if RESTARTS in entry] == [1]
    names = {f"ray_{name}" for name, _ in GAUGES.values()}
    wait_for(lambda: names <= set(exported(run="measured")), 60)
    wait_for(lambda: exported(run="measured")["ray_pipeline_step"] == [60.0], 30)
    found = exported(run="measured", method="prototypical")
    assert found["ray_pipeline_restarts"] == [1.0] and found["ray_pipeline_steps"] == [60.0]
    assert 0 < found["ray_pipeline_checkpoint_seconds"][0] < 60


def test_a_run_that_waits_says_for_what(ray_session, monkeypatch, capsys):
    monkeypatch.setattr(telemetry, "WAIT_SECONDS", 1.0)
    monkeypatch.setattr(telemetry, "PREPARE_SECONDS", 1.0)
    monitor = telemetry.start_monitor()
    display = telemetry.Display(monitor, 10, "mine", needs={"CPU": 2.0, "GPU": 1.0})
    said = ""

    def says(text):
        nonlocal said
        said += capsys.readouterr().out
        return text in said

    with display:
        wait_for(lambda: says("mine  no step after 1 s: it waits for its workers, which need 2 CPUs ("), 30)
        ray.get(monitor.begin.remote())
        wait_for(lambda: says("mine  no step 1 s after its workers came: they prepare, or wait for Ray Data ("), 60)
        ray.get(monitor.tick.remote(3))
    whole = ray.cluster_resources()["CPU"]
    assert f" of {whole:g} are free) and 1 GPUs (0 of 0 are free)" in said.splitlines()[0]


def test_a_run_without_steps_says_what_is_done_and_one_that_prepares_nothing(ray_session, monkeypatch, capsys):
    monkeypatch.setattr(telemetry, "WAIT_SECONDS", 0.1)
    for steps, line in ((0, "no  no steps are asked for: its workers validate the network"), (9, "")):
        monitor = telemetry.start_monitor()
        ray.get(monitor.begin.remote())
        with telemetry.Display(monitor, steps, "no"):
            time.sleep(2.5 * telemetry.POLL_SECONDS)
        said = capsys.readouterr().out
        assert "no step" not in said.replace("no steps are", "") and said.startswith(line), said


def test_a_plain_line_repeats_no_figure(ray_session, monkeypatch, capsys):
    monkeypatch.setattr(telemetry, "LINE_SECONDS", 0.0)
    monitor = telemetry.start_monitor()
    display = telemetry.Display(monitor, 10, "mine")
    ray.get(monitor.begin.remote())
    figures = {"train/loss": 0.5, "train/accuracy": 0.9, "train/steps_per_s": 2.0, "train/episodes_per_s": 8.0}
    with display:
        ray.get(monitor.log.remote({"step": 5, **figures}))
        wait_for(lambda: display._step == 5 and not display._new, 30)
        ray.get(monitor.tick.remote(7))
        wait_for(lambda: display._step == 7, 30)
        time.sleep(telemetry.POLL_SECONDS)
    said = capsys.readouterr().out.splitlines()
    assert [line.count("loss 0.5  acc 90.0 %") for line in said if "step 5/" in line] == [1]
    assert all("loss" not in line and "acc" not in line for line in said if "step 7/" in line)
    assert "loss 0.5  acc 90.0 %" in display.line(), "a terminal's bar shows the latest of each"


def test_what_to_do_is_said_when_a_job_is_asked_to_end_and_not_when_it_has(ray_session):
    """Who asks may not wait: Ray gives a job that is stopped three seconds, unless it was told otherwise."""
    monitor, run = telemetry.start_monitor(), Run("a", "/runs/a", {}, {}, {})
    with stopping_on_sigterm("not begun", lambda: ask_to_leave(monitor, True, run)):
        os.kill(os.getpid(), signal.SIGTERM)
    assert ray.get(monitor.tick.remote(1)), "the workers are told after their step"
    (said,) = ray.get(monitor.read.remote(0))[3]
    assert said.endswith("go on with it: python -m jobs.train resume=/runs/a")
