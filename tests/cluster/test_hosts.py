"""Hosts with addresses and disks of their own: a run goes through the store alone, and a cable is pulled."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.bed import STEPS, TASKS, Bed, assert_same, fill_store, final
from tests.cluster.consumed import check_once
from tests.cluster.hosts import GCS_PORT, Host, Impossible, Network, network
from tests.cluster.nodes import NODE_CPUS, Nodes, environment_for, object_store, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

PATIENT = 300


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, glyphs: str) -> Iterator[tuple[Network, Host, list[Host], Bed]]:
    """A head and two hosts that train, a store at the bridge, and the dataset in it."""
    before = dict(os.environ)
    try:
        with network({**os.environ}) as net, object_store(net.gateway) as objects:
            environment = environment_for(objects)
            os.environ.update(environment)
            net.environment.update(environment)
            fill_store(os.path.dirname(glyphs))
            notes = net.disk.parent / "notes"  # beside the disks: what the test's own probe writes
            notes.mkdir()
            bed = Bed(Nodes(net.disk, environment), objects, os.path.dirname(glyphs), notes)
            head = net.add()
            net.start_ray(head, "--head", f"--port={GCS_PORT}", "--num-cpus=1", "--include-dashboard=false")
            others = [net.add() for _ in range(2)]
            for host in others:
                net.start_ray(host, f"--address={head.address}:{GCS_PORT}", f"--num-cpus={NODE_CPUS}")
            script = f"import ray; ray.init(address='{head.address}:{GCS_PORT}', log_to_driver=False); "
            script += "print('alive', sum(node['Alive'] for node in ray.nodes()))"

            def joined() -> bool:
                try:
                    return "alive 3" in head.run(sys.executable, "-c", script, seconds=90)
                except (RuntimeError, subprocess.TimeoutExpired):
                    time.sleep(1)
                    return False

            wait_for(joined, PATIENT, "three hosts in one cluster")
            yield net, head, others, bed
    except Impossible as why:
        pytest.skip(f"no hosts of their own here: {why}")
    finally:
        os.environ.clear()
        os.environ.update(before)


def start(head: Host, bed: Bed, name: str, *overrides: str) -> subprocess.Popen[str]:
    address = f"cluster.address={head.address}:{GCS_PORT}"
    command = [sys.executable, "-m", "jobs.train", address, *bed.overrides(name, *overrides)]
    return head.popen(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=PATIENT)
    assert process.returncode == 0, output
    return output


def test_a_host_is_cut_off_and_comes_back(
    hosts: tuple[Network, Host, list[Host], Bed], record_property: Callable[[str, object], None]
) -> None:
    net, head, others, bed = hosts
    runs = "s3://pipeline/runs"
    began = time.monotonic()
    finish(start(head, bed, "hosts-untouched", "+method.pause=0.3"))
    untouched = time.monotonic() - began
    for host in others:  # each has fetched the shards to its own disk, and this machine's folder of that name is empty
        assert "shard-" in host.run("sh", "-c", f"ls {host.disk}/cache/*")
    assert not list(Path(net.disk).iterdir())
    groups = bed.groups("hosts-untouched")
    check_once(groups, STEPS, TASKS)

    spare = net.add()
    net.start_ray(spare, f"--address={head.address}:{GCS_PORT}", f"--num-cpus={NODE_CPUS}")
    began = time.monotonic()
    process = start(head, bed, "hosts-cut-off", "+method.pause=0.3")
    wait_for(lambda: bed.taken("hosts-cut-off") >= 13, PATIENT, "step 13")
    lost = next(h for h in [*others, spare] if _runs_here(h, bed.pid("hosts-cut-off", rank=1)))
    lost.cut_off()
    wait_for(lambda: len(bed.starts("hosts-cut-off")) > 1, PATIENT, "a second start of the workers")
    lost.connect()
    finish(process)
    seconds = time.monotonic() - began
    check_once(bed.groups("hosts-cut-off"), STEPS, TASKS)
    whole, hurt = (_last(bed, f"{runs}/{name}") for name in ("hosts-untouched", "hosts-cut-off"))
    assert_same(whole, hurt)
    record_property("fault", {
        "fault": "host cut off from the network and back", "seconds": seconds, "lost": seconds - untouched,
        "outcome": "same weights, bit for bit; every episode once",
    })  # fmt: skip


def _last(bed: Bed, uri: str):  # noqa: ANN202
    from pipeline.training.runs import read_run

    return final(read_run(uri))


def _runs_here(host: Host, pid: int) -> bool:
    return os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat(f"/proc/{host.process.pid}/ns/net").st_ino
