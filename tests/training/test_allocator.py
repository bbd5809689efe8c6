"""Memory in large pages: the kernel is asked for it far less often."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.training.allocator import LARGE_PAGES

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
    plain = {key: value for key, value in os.environ.items() if key not in LARGE_PAGES}
    run = [sys.executable, "-c", FAULTS]
    return int(subprocess.run(run, env=plain | variables, capture_output=True, text=True, check=True).stdout)


def large_pages() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[madvise]" in setting.read_text() and os.confstr("CS_GNU_LIBC_VERSION") >= "glibc 2.35"


@pytest.mark.skipif(not large_pages(), reason="no large pages on request here")
def test_memory_that_was_freed_costs_little_to_get_again() -> None:
    plain, large = faults(), faults(**LARGE_PAGES)
    assert plain > 100_000, "there is nothing to gain: the module can go"
    assert large < plain / 10


STARTED = """
import ray
from pipeline.config import compose, validate
from pipeline.training.cluster import start_ray
from pipeline.training.config import TrainConfig

def told():
    with open("/proc/self/environ") as file:
        return file.read().split(chr(0))

start_ray(validate(TrainConfig, compose("train", ["cluster.workers=1", "cluster.object_store_mb=100"])).cluster)
print(*ray.get(ray.remote(told).remote()), sep=chr(10))
"""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc")
def test_processes_of_ray_start_with_them() -> None:
    plain = {key: value for key, value in os.environ.items() if key not in LARGE_PAGES}
    told = subprocess.run([sys.executable, "-c", STARTED], env=plain, capture_output=True, text=True, check=True)
    assert {f"{key}={value}" for key, value in LARGE_PAGES.items()} <= set(told.stdout.split("\n"))
