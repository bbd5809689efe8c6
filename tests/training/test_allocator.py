"""Memory that is kept: the kernel is asked for it once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.training.allocator import ALLOCATOR

# As in a training worker: in a thread, blocks of 40 MB and more, freed and needed again.
FAULTS = """
import resource, threading, torch

def passes(count):
    for _ in range(count):
        kept = [torch.ones(size, 2**20) for size in (10, 20, 40)]

def main():
    passes(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    passes(5)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=main)
thread.start()
thread.join()
"""


def faults(**variables: str) -> int:
    plain = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    run = [sys.executable, "-c", FAULTS]
    return int(subprocess.run(run, env=plain | variables, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") < "glibc 2.26", reason="no tunables of the C library")
def test_memory_that_was_freed_is_not_asked_for_again() -> None:
    plain, kept = faults(), min(faults(**ALLOCATOR) for _ in range(3))  # the kernel adds some of its own now and then
    assert plain > 100_000, "there is nothing to gain: the module can go"
    assert kept < plain / 1000


STARTED = """
import ray
from pipeline.config import compose, validate
from pipeline.training.cluster import start_ray
from pipeline.training.config import TrainConfig

def told():
    with open("/proc/self/environ") as file:
        return file.read().replace(":", chr(0)).split(chr(0))  # glibc itself ends a tunable's value there

start_ray(validate(TrainConfig, compose("train", ["cluster.workers=1", "cluster.object_store_mb=100"])).cluster)
print(*ray.get(ray.remote(told).remote()), sep=chr(10))
"""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc")
def test_processes_of_ray_start_with_them() -> None:
    plain = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    told = subprocess.run([sys.executable, "-c", STARTED], env=plain, capture_output=True, text=True, check=True)
    wanted = ":".join(f"{key}={value}" for key, value in ALLOCATOR.items()).split(":")
    assert set(wanted) <= set(told.stdout.split("\n"))
