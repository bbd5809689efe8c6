"""Under Ray Train: workers that die and drivers that die change no bit of the result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from pipeline import store
from pipeline.config import compose
from pipeline.errors import PipelineError
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.launch import launch
from pipeline.training.learner import Learner
from pipeline.training.prepare import prepare
from pipeline.training.runs import best_checkpoint, checkpoints, write_run

from .conftest import METHODS


def final(run_uri: str):
    return load_checkpoint(checkpoints(run_uri)[-1])


def assert_same(a, b) -> None:
    assert a.step == b.step
    for part in ("model", "optimizer"):
        x, y = getattr(a, part), getattr(b, part)
        assert x.keys() == y.keys()
        for name in x:
            assert torch.equal(x[name], y[name]), name


def train_workers() -> list[psutil.Process]:
    """The training workers of this process' own Ray."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


def kill_a_worker_after(run_uri: str, count: int) -> threading.Thread:
    """A thread that kills one training worker once ``count`` checkpoints are written."""

    def watch() -> None:
        while len(checkpoints(run_uri)) < count:
            time.sleep(0.05)
        time.sleep(0.6)  # until the controller has seen the checkpoint
        train_workers()[0].send_signal(signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m == "maml" else pytest.mark.slow) for m in METHODS])
def test_a_killed_worker_changes_no_bit(ray_session, small_run, method):
    """Two DDP workers, one killed in mid-run: the same weights, moments and step as an untouched run."""
    raw = small_run(method, "name=untouched", "steps=16", "checkpoint.keep=9")
    config, _, whole = prepare(raw)
    launch(config, whole)
    pause = small_run(method, "name=killed", "steps=16", "checkpoint.keep=9", "validation.episodes=10")
    config, _, hurt = prepare(pause)
    thread = kill_a_worker_after(hurt.uri, 1)
    launch(config, hurt)
    thread.join(timeout=1)
    assert not thread.is_alive(), "the worker was never killed"
    assert_same(final(whole.uri), final(hurt.uri))


def test_a_killed_driver_is_resumed(ray_session, glyphs, tmp_path):
    """The whole job is killed, Ray with it; ``resume`` goes on and ends as if nothing had happened."""
    root, name = glyphs.rsplit("/", 1)
    small = [
        f"data.root={root}", f"data.name={name}", f"storage={tmp_path}", "evaluation=null", "register_as=null",
        "tracking=none", "backbone.width=8", "validation.every=10", "validation.episodes=10", "checkpoint.every=10",
        "train.query=5", "cluster.object_store_mb=150",
    ]  # fmt: skip
    job = [sys.executable, "-m", "jobs.train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(*overrides: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*job, *overrides],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    config, _, untouched = prepare(compose("train", [*small, "name=untouched", "steps=60"]))
    launch(config, untouched)
    victim = start(*small, "name=killed", "steps=60")
    while len(checkpoints(f"{tmp_path}/killed")) < 2:
        assert victim.poll() is None, victim.stdout.read().decode()
        time.sleep(0.02)
    for process in psutil.Process(victim.pid).children(recursive=True) + [psutil.Process(victim.pid)]:
        process.kill()
    victim.wait()
    left = final(f"{tmp_path}/killed")
    assert left.step < 60, "the job ended before it was killed"
    resumed = start(f"storage={tmp_path}", "resume=killed", "tracking=none")
    output, _ = resumed.communicate(timeout=180)
    assert resumed.returncode == 0, output.decode()
    assert_same(final(untouched.uri), final(f"{tmp_path}/killed"))


def test_one_and_two_workers_agree(ray_session, small_run):
    """The same episodes in every step; sums in another order, so that the last bits may differ.

    SGD, since Adam's first steps turn the rounding noise of a vanishing gradient into a step of full size. Without
    convolutions, since on drawings they amplify: all the paper of a channel is one value, which passes a ReLU's kink at
    once (in float64, weights 1e-6 apart are 1e-2 apart a few steps later; here they stay 1e-6 apart). And tasks in a
    loop, since rounding would depend on how many tasks there are.
    """
    runs = []
    for workers in (1, 2):
        overrides = ["steps=6", "validation.every=6", "optimizer=sgd", "optimizer.lr=0.01", "backbone=mlp"]
        overrides.append("method.inner_loop=loop")
        config, _, run = prepare(small_run("maml", f"name=w{workers}", f"cluster.workers={workers}", *overrides))
        launch(config, run)
        runs.append(final(run.uri))
    start = Learner(config, run.spec).method.state_dict()
    for name, value in runs[0].model.items():
        torch.testing.assert_close(value, runs[1].model[name], rtol=1e-5, atol=1e-6, msg=name)
    assert any(not torch.allclose(start[name], value, rtol=1e-2) for name, value in runs[0].model.items())


def test_checkpoints_are_kept_by_policy(ray_session, small_run):
    raw = small_run(
        "prototypical", "name=policy", "steps=12", "checkpoint.every=2", "validation.every=4", "checkpoint.keep=2"
    )
    config, _, run = prepare(raw)
    entries: list[dict] = []
    launch(config, run, entries.append)
    kept = checkpoints(run.uri)
    assert 2 <= len(kept) <= 3 and kept[-1].endswith("step_00000012")
    accuracies = {entry["step"]: entry["val/accuracy"] for entry in entries if "val/accuracy" in entry}
    assert sorted(accuracies) == [4, 8, 12]
    best = max(accuracies, key=lambda step: (accuracies[step], -step))
    assert best_checkpoint(run.uri).endswith(f"step_{best:08d}")
    logged = [entry["step"] for entry in entries if "train/loss" in entry]
    assert logged == [3, 6, 9, 12] and all(0 <= e["train/wait_share"] <= 1 for e in entries if "train/loss" in e)


def test_object_storage(ray_session, small_run, moto_bucket):
    """Shards from, and checkpoints to, an S3 store."""
    raw = small_run("prototypical", "name=remote")
    source = f"{raw['data']['root']}/{raw['data']['name']}"
    for name in store.list_names(source):
        store.write_bytes(f"{moto_bucket}/datasets/glyphs/{name}", store.read_bytes(f"{source}/{name}"))
    raw["data"] = {**raw["data"], "root": f"{moto_bucket}/datasets", "name": "glyphs"}
    remote = {**raw, "storage": f"{moto_bucket}/runs"}
    config, _, run = prepare(remote)
    launch(config, run)
    local = small_run("prototypical", "name=local")
    config, _, here = prepare(local)
    launch(config, here)
    assert_same(final(run.uri), final(here.uri))


def test_a_loss_that_is_not_finite_ends_the_run_at_once(ray_session, small_run):
    config, _, run = prepare(small_run("prototypical", "name=diverges", "optimizer.lr=1e30", "cluster.restarts=5"))
    with pytest.raises(PipelineError, match=r"run diverges: the loss is NaN or infinite in step \d, with episodes \d"):
        launch(config, run)


def test_a_resumed_run_keeps_its_configuration(small_run, tmp_path):
    with pytest.raises(PipelineError, match="seed: a resumed run keeps its stored configuration"):
        prepare(compose("train", ["resume=killed", f"storage={tmp_path}", "seed=5"]))
    with pytest.raises(PipelineError, match="no run 'killed'"):
        prepare(compose("train", ["resume=killed", f"storage={tmp_path}"]))


@pytest.mark.parametrize("key", ["resume", "initial", "method.teacher"])
def test_a_run_in_an_object_store_that_is_not_there_is_named_as_it_was_given(small_run, moto_bucket, key):
    """And not looked for in a local folder of that name."""
    uri, teacher = f"{moto_bucket}/runs/nobody", "rfs" if key == "method.teacher" else "prototypical"
    with pytest.raises(PipelineError) as caught:
        prepare(compose("train", [f"resume={uri}"]) if key == "resume" else small_run(teacher, f"{key}={uri}"))
    assert uri in str(caught.value) and "/s3:" not in str(caught.value) and "no folder" not in str(caught.value)


def test_a_resumed_run_may_be_given_the_default_of_where_it_runs(small_run, tmp_path):
    """What is asked for counts, also where it is the default: a run of one worker goes on with the usual two."""
    _, raw, run = prepare(small_run("prototypical", "name=one", "cluster.workers=1", "cluster.restarts=7"))
    write_run(run)
    where = ["resume=one", f"storage={raw['storage']}"]
    assert compose("train", ["cluster.workers=2"]) == compose("train"), "two are the default"
    assert [prepare(compose("train", [*where, *more]))[0].cluster.workers for more in ([], ["cluster.workers=2"])] == [
        1,
        2,
    ]
    config = prepare(compose("train", [*where, "cluster=local"]))[0]
    assert (config.cluster.workers, config.cluster.restarts) == (2, 3)


def test_a_run_from_before_a_key_was_there_is_resumed_with_its_default(small_run, tmp_path):
    _, raw, run = prepare(small_run("prototypical", "name=old", "train.holdout=0.1"))
    old = {**raw, "train": {key: value for key, value in raw["train"].items() if key != "grouping"}}
    record = {"name": "old", "config": old, "spec": run.spec, "dataset": run.dataset, "arguments": []}
    store.write_bytes(f"{run.uri}/run.json", json.dumps(record).encode())
    config, found, resumed = prepare(compose("train", ["resume=old", f"storage={raw['storage']}"]))
    assert config.train.grouping is None and config.train.holdout == 0.1
    assert found["train"] == resumed.config["train"] == raw["train"] and found["method"] == raw["method"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["cluster.workers=64", "train.meta_batch_size=64"],
            "cluster.workers=64 of cluster.cpus_per_worker=1 need 64 CPUs; the cluster has 4"),
        (["cluster.workers=4", "materialize=cluster"], "leave none for Ray Data"),
        (["cluster.gpus_per_worker=1"], "need 2 GPUs; the cluster has 0"),
    ],
)  # fmt: skip
def test_what_the_cluster_cannot_give_is_refused(ray_session, small_run, overrides, says):
    config, _, run = prepare(small_run("prototypical", *overrides))
    with pytest.raises(PipelineError, match="cluster") as error:
        launch(config, run)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_run_that_has_every_cpu_plans_and_trains(ray_session, small_run):
    """As two runs that fill a cluster together: no CPU is left for planning, and none is needed."""
    config, _, run = prepare(small_run("prototypical", "cluster.workers=1", "cluster.cpus_per_worker=4", "name=full"))
    launch(config, run)
    assert checkpoints(run.uri)[-1].endswith(f"step_{config.steps:08d}")
