"""What is done to a training on several nodes, and what must hold: the untouched run's weights, bit for bit.

Every test ends in bounded time, and says what the fault cost: ``make test-faults`` prints the table.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from pipeline import store
from pipeline.config import compose
from pipeline.errors import PipelineError
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.launch import launch
from pipeline.training.prepare import prepare
from pipeline.training.replay import replay_job
from pipeline.training.runs import Run, checkpoints, find_run
from tests.cluster.bed import SELDOM, STEPS, TASKS, Bed, assert_same, fill_store, final, meanwhile
from tests.cluster.conftest import free_ports
from tests.cluster.consumed import check_once
from tests.cluster.nodes import BUCKET, ROOT, Nodes, environment_for, object_store, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600)]

Says = Callable[[str, str, float, float | None], None]
RUNS = f"s3://{BUCKET}/runs"
SAME = "same weights, bit for bit; every episode once"
PATIENT = 240  # seconds to wait for a state of a run on a busy machine


@pytest.fixture(scope="module")
def whole_bed(tmp_path_factory: pytest.TempPathFactory, glyphs: str) -> Iterator[Bed]:
    """A head, two nodes and a store, for all tests; nodes that a test takes away are replaced before the next."""
    with object_store() as objects:
        environment = environment_for(objects)
        before = dict(os.environ)
        os.environ.update(environment)
        fill_store(os.path.dirname(glyphs))
        nodes = Nodes(tmp_path_factory.mktemp("nodes"), environment)
        try:
            nodes.start(2)
            bed = Bed(nodes, objects, os.path.dirname(glyphs), tmp_path_factory.mktemp("notes"))
            bed.reference()
            yield bed
        finally:
            nodes.stop()
            os.environ.clear()
            os.environ.update(before)


@pytest.fixture
def bed(whole_bed: Bed) -> Iterator[Bed]:
    whole_bed.nodes.replace(2)
    yield whole_bed
    whole_bed.store.fail()


@pytest.fixture
def says(record_property: Callable[[str, object], None]) -> Says:
    """Put a line into the table of faults."""

    def note(fault: str, outcome: str, seconds: float, untouched: float | None) -> None:
        lost = None if untouched is None else seconds - untouched
        record_property("fault", {"fault": fault, "outcome": outcome, "seconds": seconds, "lost": lost})

    return note


# 1. A worker is killed


@pytest.mark.parametrize(("place", "at"), [("forward", 23), ("validation", 3)])
def test_a_worker_is_killed(bed: Bed, says: Says, place: str, at: int) -> None:
    run, seconds = bed.train(f"killed-{place}", f"+method.fault={place}", f"+method.at={at}", "+method.rank=1")
    says(f"worker killed in {place}", SAME, seconds, bed.check(run))


def test_a_worker_is_killed_in_all_reduce(bed: Bed, says: Says) -> None:
    """One worker is held back before its part of the sum; the other, which waits for it, is killed."""
    name = "killed-all-reduce"

    def kill() -> None:
        wait_for((bed.notes / name / "held").exists, PATIENT, "a worker in all-reduce")
        os.kill(bed.pid(name, rank=0), signal.SIGKILL)

    fault = meanwhile(kill)
    run, seconds = bed.train(name, "+method.fault=all_reduce", "+method.at=23", "+method.rank=1")
    fault.done()
    says("worker killed in all-reduce", SAME, seconds, bed.check(run))


def test_a_worker_is_killed_while_it_writes_a_checkpoint(bed: Bed, says: Says) -> None:
    """The store holds the upload of step 20 back; the worker that uploads dies in it."""
    name = "killed-checkpoint"
    bed.store.fail({"match": f"P(U|OS)T .*{name}/step_00000020/", "kind": "slow", "delay": 20, "times": 1})

    def kill() -> None:
        wait_for(lambda: bed.store.met() == [1], PATIENT, "the upload of a checkpoint")
        os.kill(bed.pid(name, rank=0), signal.SIGKILL)

    fault = meanwhile(kill)
    run, seconds = bed.train(name)
    fault.done()
    says("worker killed while it writes a checkpoint", SAME, seconds, bed.check(run))


# 4. The store, the shards and the checkpoints


def test_the_store_fails_for_a_minute(bed: Bed, says: Says) -> None:
    """Reading gives 500, writing 503 and "slow down": it is asked again, and nobody is restarted."""
    name, lasts = "store-away", 60.0

    def fail() -> None:
        wait_for(lambda: bed.taken(name) >= 12, PATIENT, "step 12")
        bed.store.fail(
            {"match": "(GET|HEAD) ", "kind": "status", "status": 500, "code": "InternalError", "seconds": lasts},
            {"match": "POST ", "kind": "status", "status": 503, "code": "ServiceUnavailable", "seconds": lasts},
            {"match": ".", "kind": "status", "status": 503, "code": "SlowDown", "seconds": lasts},
        )

    fault = meanwhile(fail)
    run, seconds = bed.train(name, "+method.pause=0.1")
    fault.done()
    assert sum(bed.store.met()) > 3
    says("store answers 500, 503, slow down for 60 s", SAME, seconds, bed.check(run, starts=1))


def test_a_slow_store(bed: Bed, says: Says) -> None:
    bed.store.fail({"match": ".", "kind": "slow", "delay": 0.5})
    run, seconds = bed.train("store-slow")
    says("store answers after 0.5 s", SAME, seconds, bed.check(run, starts=1))


@pytest.mark.parametrize("kind", ["flip", "truncate", "cut"])
def test_a_shard_is_altered_on_its_way(bed: Bed, says: Says, kind: str) -> None:
    """It is not trained on, but fetched again."""
    bed.forget_shards()
    bed.store.fail({"match": r"GET [^?]*shard-\w+\.arrow", "kind": kind, "times": 1})
    run, seconds = bed.train(f"shard-{kind}")
    assert bed.store.met() == [1]
    what = {"flip": "has a flipped bit", "truncate": "is truncated", "cut": "breaks off"}[kind]
    says(f"shard {what} on its way", f"fetched again; {SAME}", seconds, bed.check(run, starts=1))


def test_a_shard_that_is_damaged_in_the_store_is_refused_by_name(bed: Bed, says: Says) -> None:
    bed.forget_shards()
    bed.store.fail({"match": r"GET [^?]*shard-\w+\.arrow", "kind": "flip"})
    began = time.monotonic()
    with pytest.raises(PipelineError, match=r"shard s3://.*/shard-\w+\.arrow is damaged") as error:
        bed.train("shard-broken", "cluster.restarts=0")
    assert "\n" not in str(error.value)
    assert bed.taken("shard-broken") == 0, "nothing was trained on it"
    says("shard damaged in the store", "refused by name; no step taken", time.monotonic() - began, None)


def test_a_shard_that_is_damaged_in_a_nodes_cache_is_fetched_again(bed: Bed, says: Says) -> None:
    for shard in bed.cached_shards():
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    run, seconds = bed.train("shard-cache")
    says("shard damaged in a node's cache", f"fetched again; {SAME}", seconds, bed.check(run, starts=1))


def test_a_damaged_checkpoint_is_passed_over(bed: Bed, says: Says, capfd: pytest.CaptureFixture[str]) -> None:
    """One bit of the last checkpoint is another, and then a worker is killed: the run goes on from the one before."""
    name = "checkpoint-damaged"

    def damage_and_kill() -> None:
        wait_for((bed.notes / name / "held").exists, PATIENT, "step 34")
        wait_for(lambda: bed.committed(name, 30), PATIENT, "the checkpoint of step 30")
        weights = f"{RUNS}/{name}/step_00000030/model.safetensors"
        content = bytearray(store.read_bytes(weights))
        content[-5] ^= 4
        store.write_bytes(weights, bytes(content))
        os.kill(bed.pid(name, rank=0), signal.SIGKILL)

    fault = meanwhile(damage_and_kill)
    run, seconds = bed.train(name, "+method.fault=all_reduce", "+method.at=33", "+method.rank=1", "log_every=1")
    fault.done()
    untouched = bed.check(run)
    assert bed.groups(name)[1].first == 20
    said = capfd.readouterr().out
    assert "step_00000030 is corrupt: model.safetensors" in said and "goes on from step 20" in said
    for uri in checkpoints(run.uri):
        load_checkpoint(uri)  # the damaged one is no checkpoint any more
    says("checkpoint with a flipped bit", f"the one before is taken, and said; {SAME}", seconds, untouched)


# 7. A NaN or infinite loss


def test_a_loss_that_is_no_number(bed: Bed, says: Says, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    poison = next(digest for digest, number in bed.episodes().items() if number == 93)
    began = time.monotonic()
    told = r"the loss is NaN or infinite in step 24, with episodes 92\.\.93;"
    with pytest.raises(PipelineError, match=told) as error:
        bed.train("poisoned", f"+method.poison='{poison}'")
    seconds = time.monotonic() - began
    assert f"python -m jobs.replay run={RUNS}/poisoned step=24" in str(error.value) and "\n" not in str(error.value)
    kept = [load_checkpoint(uri) for uri in checkpoints(f"{RUNS}/poisoned")]
    assert [checkpoint.step for checkpoint in kept] == [10, 20]
    assert all(torch.isfinite(value).all() for value in kept[-1].model.values())
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path))  # of this process, which reads the dataset from the store too
    found = replay_job({"run": "poisoned", "storage": RUNS, "step": 24})
    assert found["not_finite"] == [93] and found["from"] == 20
    says("NaN or infinite loss", "stopped; checkpoint of step 20 kept; episode 93 found by jobs.replay", seconds, None)


# 3. Notices


def test_sigterm_to_a_worker(bed: Bed, says: Says) -> None:
    """A checkpoint of the step in hand within the grace period, then the machine is gone."""
    name = "sigterm-worker"
    graces: list[float] = []

    def terminate() -> None:
        wait_for(lambda: bed.taken(name) >= 13, PATIENT, "step 13")
        began = time.monotonic()
        os.kill(bed.pid(name, rank=1), signal.SIGTERM)
        saved = wait_for(lambda: bed.noticed(name), 60, "a checkpoint of the step in hand")
        graces.append(time.monotonic() - began)
        wait_for(lambda: bed.taken(name) > saved[0] + 4, PATIENT, "a few steps more")
        os.kill(bed.pid(name, rank=1), signal.SIGKILL)

    fault = meanwhile(terminate)
    run, seconds = bed.train(name, *SELDOM)
    fault.done()
    untouched = bed.check(run)
    assert bed.groups(name)[1].first in bed.noticed(name), "goes on from the step at which it was told"
    assert graces[0] < 30
    says("SIGTERM to a worker, then killed", f"checkpoint after {graces[0]:.1f} s; {SAME}", seconds, untouched)


def test_a_spot_notice(bed: Bed, says: Says) -> None:
    """Ray is told that a node will be reclaimed (``ray drain-node``); a checkpoint, and then the node is gone."""
    name = "spot"
    bed.nodes.add()
    graces: list[float] = []

    def reclaim() -> None:
        wait_for(lambda: bed.taken(name) >= 13, PATIENT, "step 13")
        node = bed.node_of(name, rank=1)
        began = time.monotonic()
        bed.nodes.drain(node, seconds=60)
        wait_for(lambda: bed.noticed(name), 60, "a checkpoint of the step in hand")
        graces.append(time.monotonic() - began)
        bed.nodes.kill(node)

    fault = meanwhile(reclaim)
    run, seconds = bed.train(name, *SELDOM)
    fault.done()
    untouched = bed.check(run)
    says("spot notice, then the node is gone", f"checkpoint after {graces[0]:.1f} s; {SAME}", seconds, untouched)


def job(bed: Bed, name: str, *overrides: str) -> subprocess.Popen[str]:
    """``jobs.train`` in a process of its own, on the bed's cluster."""
    config = bed.overrides(name, *overrides)
    command = [sys.executable, "-m", "jobs.train", f"cluster.address={bed.nodes.cluster.address}", *config]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def resume(bed: Bed, name: str, *overrides: str) -> tuple[Run, float]:
    config, _, run = prepare(compose("train", [f"resume={name}", f"storage={RUNS}", "tracking=none", *overrides]))
    began = time.monotonic()
    launch(config, run)
    return run, time.monotonic() - began


def test_sigterm_to_the_job(bed: Bed, says: Says) -> None:
    """It writes a checkpoint, ends with 143 and says how to go on; and so it does."""
    name, began = "sigterm-job", time.monotonic()
    process = job(bed, name, *SELDOM)
    wait_for(lambda: bed.taken(name) >= 13, PATIENT, "step 13")
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: bed.noticed(name), 60, "a checkpoint of the step in hand")
    grace = time.monotonic() - told
    output, _ = process.communicate(timeout=PATIENT)
    assert process.returncode == 143, output
    hint = f"as asked, with a checkpoint; go on with it: python -m jobs.train resume={RUNS}/sigterm-job"
    assert hint in output, output
    run, _ = resume(bed, name)
    untouched = bed.check(run)
    assert bed.groups(name)[1].first == bed.noticed(name)[0]
    says(
        "SIGTERM to the job, then resume",
        f"checkpoint after {grace:.1f} s; {SAME}",
        time.monotonic() - began,
        untouched,
    )


# 2. Nodes and the driver


def test_a_node_is_killed(bed: Bed, says: Says) -> None:
    bed.nodes.add()
    name = "node-killed"

    def kill() -> None:
        wait_for(lambda: bed.taken(name) >= 23, PATIENT, "step 23")
        bed.nodes.kill(bed.node_of(name, rank=1))

    fault = meanwhile(kill)
    run, seconds = bed.train(name, "+method.pause=0.3")
    fault.done()
    says("node killed", SAME, seconds, bed.check(run))


def test_a_node_stands_still_and_comes_back(bed: Bed, says: Says) -> None:
    """All its processes are stopped until Ray has given the node up, and go on afterwards: nothing of theirs counts."""
    bed.nodes.add()
    name = "node-frozen"

    def freeze() -> None:
        wait_for(lambda: bed.taken(name) >= 23, PATIENT, "step 23")
        node = bed.node_of(name, rank=1)
        with bed.nodes.frozen(node):
            wait_for(lambda: len(bed.starts(name)) > 1, PATIENT, "a second start of the workers")
        wait_for(lambda: not bed.nodes.alive(node), 120, "the end of the node that was given up")
        bed.nodes.kill(node)

    fault = meanwhile(freeze)
    run, seconds = bed.train(name, "+method.pause=0.3")
    fault.done()
    says("node stands still for a while", SAME, seconds, bed.check(run))


def test_the_driver_is_killed_and_the_job_resumed(bed: Bed, says: Says) -> None:
    name, began = "driver-killed", time.monotonic()
    process = job(bed, name, "+method.pause=0.3")
    wait_for(lambda: bed.taken(name) >= 23, PATIENT, "step 23")
    process.kill()
    process.communicate()
    run, _ = resume(bed, name)
    says("driver killed, then resume", SAME, time.monotonic() - began, bed.check(run))


# 6. The MLflow server


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """A server on this port, on the store that an earlier one has left in ``folder``."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/served"]
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: _healthy(port), PATIENT, "the MLflow server")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _healthy(port: int) -> bool:
    import requests

    try:
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok
    except requests.RequestException:
        return False


@pytest.mark.parametrize("away", ["start", "middle", "end"])
def test_the_mlflow_server_is_away(
    bed: Bed, says: Says, tmp_path: Path, capfd: pytest.CaptureFixture[str], away: str
) -> None:
    """The training does not wait for it; what did not arrive is delivered later, and nothing is there twice."""
    from mlflow import MlflowClient

    from pipeline.registry.publish import publish
    from pipeline.workflow import train

    (port,), name = free_ports(1), f"mlflow-{away}"
    served = ExitStack()

    def up() -> None:
        served.enter_context(mlflow_server(tmp_path, port))

    def change() -> None:
        wait_for(lambda: bed.taken(name) >= 13, PATIENT, "step 13")
        if away != "start":
            served.close()
        if away == "middle":
            wait_for(lambda: bed.taken(name) >= 27, PATIENT, "step 27")
        if away != "end":
            up()

    with served:
        if away != "start":
            up()
        fault = meanwhile(change)
        tracking = ["tracking=server", f"tracking.uri=http://127.0.0.1:{port}"]
        timeout = "tracking.timeout=5" if away == "end" else "tracking.timeout=240"
        raw = compose("train", [*bed.overrides(name, "+method.pause=0.3"), *tracking, timeout])
        began = time.monotonic()
        summary = train(raw)
        seconds = time.monotonic() - began
        fault.done()
        said = capfd.readouterr().out
        if away == "end":
            assert summary["exit_code"] == 75
            assert "undelivered" in summary and f"python -m jobs.register run={RUNS}/{name}" in said
            up()
            publish(f"{RUNS}/{name}", raw["tracking"])
        client = MlflowClient(tracking_uri=f"http://127.0.0.1:{port}")
        (found,) = client.search_runs([client.get_experiment_by_name("few-shot").experiment_id])
        for metric in found.data.metrics:
            steps = [point.step for point in client.get_metric_history(found.info.run_id, metric)]
            assert len(steps) == len(set(steps)), f"{metric} is there twice"
        assert [point.step for point in client.get_metric_history(found.info.run_id, "val/accuracy")] == [20, 40]
    run = find_run(name, RUNS)
    says(f"MLflow away at the {away}", f"nothing lost, nothing twice; {SAME}", seconds, bed.check(run, starts=1))


# 8. Fewer or more workers


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_workers_after_the_restart(
    bed: Bed, says: Says, capsys: pytest.CaptureFixture[str], before: int, after: int
) -> None:
    """The same episodes a step; the sums, and so the weights, differ in the last bits, which is said.

    A network without batch-norm, whose statistics would be taken over other images, and SGD, since Adam's first steps
    turn the rounding noise of a vanishing gradient into a step of full size.
    """
    plain = ["backbone=mlp", "optimizer=sgd", "optimizer.lr=0.01"]
    whole, _ = bed.train(f"elastic-{before}-whole", *plain, f"cluster.workers={before}")
    name, began = f"elastic-{before}-{after}", time.monotonic()
    fault = ["+method.fault=forward", "+method.at=23", "cluster.restarts=0"]
    with pytest.raises(ray.train.TrainingFailedError):
        bed.train(name, *plain, *fault, f"cluster.workers={before}")
    run, _ = resume(bed, name, f"cluster.workers={after}")
    said = capsys.readouterr().out
    assert f"{after} workers from here on, {before} at its beginning" in said and "last bits" in said
    groups = bed.groups(name)
    assert [group.workers for group in groups] == [before, after]
    check_once(groups, STEPS, TASKS)
    largest = 0.0
    a, b = final(whole), final(run)
    for key, value in a.model.items():
        torch.testing.assert_close(b.model[key], value, rtol=1e-5, atol=1e-7, msg=key)
        largest = max(largest, float((b.model[key] - value).abs().max()))
    outcome = f"same episodes a step; weights differ by at most {largest:.1e}"
    says(f"{after} instead of {before} workers after the restart", outcome, time.monotonic() - began, None)


# 5. What is full


@contextmanager
def small_disk(*places: Path) -> Iterator[None]:
    """Each of these folders on a disk of its own, of 16 kB."""
    mounted = []
    try:
        for place in places:
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)], capture_output=True)
            if done.returncode:
                pytest.skip(f"small disks need mount, which this machine refuses: {done.stderr.decode().strip()}")
            mounted.append(place)
        yield
    finally:
        for place in mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize(("folder", "knob"), [("tmp", "TMPDIR"), ("cache", "PIPELINE_CACHE")])
def test_a_full_disk(bed: Bed, says: Says, folder: str, knob: str) -> None:
    """One line that names the knob; with room again, the run goes on."""
    name, began = f"disk-{folder}", time.monotonic()
    places = [bed.nodes.local(node) / folder for node in bed.nodes.nodes]
    with small_disk(*places), pytest.raises(PipelineError, match="is full: free space there") as error:
        bed.train(name, "cluster.restarts=0")
    assert knob in str(error.value) and "\n" not in str(error.value)
    resume(bed, name)
    config = prepare(compose("train", [f"resume={name}", f"storage={RUNS}", "tracking=none"]))
    assert_same(bed.reference()[0], final(config[2]))
    says(f"disk full ({folder})", "one line that names the knob; resumed: same weights", time.monotonic() - began, None)


def test_a_full_object_store(bed: Bed, says: Says) -> None:
    """Others' objects fill the stores of the nodes; Ray moves them to disk, and the run is the same."""

    @ray.remote(num_cpus=0.1, scheduling_strategy="SPREAD")
    def fill(megabytes: int) -> Any:
        import numpy as np

        return np.zeros(megabytes * 2**20, dtype=np.uint8)

    held = [fill.remote(15) for _ in range(30)]
    ray.wait(held, num_returns=len(held), timeout=120)
    run, seconds = bed.train("store-full")
    untouched = bed.check(run, starts=1)
    del held
    says("object store full", f"spilled to disk; {SAME}", seconds, untouched)


def test_a_worker_without_memory(bed: Bed, says: Says) -> None:
    began = time.monotonic()
    with pytest.raises(PipelineError, match="out of memory: lower train.meta_batch_size") as error:
        bed.train("memory", "+method.fault=memory", "+method.at=3", "cluster.restarts=0")
    assert "\n" not in str(error.value)
    says("worker out of memory", "one line that names the knob", time.monotonic() - began, None)
