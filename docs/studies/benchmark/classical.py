"""What a classical step costs on CPU: memory as PyTorch gets it, kept by the allocator, and products in bfloat16."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from docs.studies.benchmark import made
from docs.studies.benchmark.apart import Apart
from docs.studies.benchmark.rows import Bench, Finding, ratio, row
from docs.studies.benchmark.timing import interleaved, seconds
from pipeline.environment import bfloat16_instructions
from pipeline.training.allocator import ALLOCATOR

IMAGES = 128  # a step
SHAPES: tuple[made.Shape, ...] = (made.OMNIGLOT, (3, 32, 32), made.MINI_IMAGENET)
PLAIN, PAGES, KEPT, HALF = "as PyTorch comes", "large pages alone", "memory kept", "kept, bfloat16"
ALLOCATORS = {PAGES: {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, KEPT: ALLOCATOR, HALF: ALLOCATOR}


def classical_steps(steps: int, shape: made.Shape, half: bool) -> Iterator[tuple[float, float, float]]:
    """Of a step of Conv-4-64 under a linear classifier of 64 classes, on all cores: milliseconds and page faults, and
    the process's largest memory so far in MB. Forward, backward and SGD, on a batch that is there already."""
    backbone = made.model("baseline", shape, way=5).backbone
    network = nn.Sequential(backbone, nn.Linear(int(backbone.out_features), 64))  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    images, labels = torch.rand(IMAGES, *shape), torch.arange(IMAGES) % 64
    network.train()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            scores = network(images)
        loss = nn.functional.cross_entropy(scores.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    while True:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        spent = seconds(step, steps)
        after = resource.getrusage(resource.RUSAGE_SELF)
        yield 1e3 * spent, max(1, after.ru_minflt - before) / steps, after.ru_maxrss / 1024


@row("step")
def classical(bench: Bench) -> Iterator[Finding]:
    """A classical step with memory that is kept, and in bfloat16, against PyTorch as it comes."""
    instructions = bfloat16_instructions()
    names = [PLAIN, PAGES, KEPT] + ([HALF] if instructions else [])
    for shape in SHAPES:
        steps = bench.count(840 // shape[-1], 2)
        with ExitStack() as stack:
            sides = {
                name: stack.enter_context(
                    Apart(classical_steps, steps, shape, name == HALF, threads=os.cpu_count() or 1,
                          allocator=ALLOCATORS.get(name))
                )
                for name in names
            }  # fmt: skip
            found: dict[str, Any] = dict(interleaved(sides, bench.repetitions))
        times, faults, peak = ({name: [f[k] for f in values] for name, values in found.items()} for k in range(3))
        what = f"classical step of {IMAGES} images {shape[1]}x{shape[2]}x{shape[0]}, Conv-4-64, all cores"
        yield ratio(f"{what}: memory as PyTorch comes against memory kept", times, (PLAIN, KEPT), "ms")
        yield ratio("page faults of that step", faults, (PLAIN, KEPT), "faults")
        above = [kept - plain for kept, plain in zip(peak[KEPT], peak[PLAIN], strict=True)]
        yield Finding("peak memory of that process above PyTorch's", above, "MB", sides=peak, measure="MB")
        if instructions:
            yield ratio(f"{what}: float32 against bfloat16 ({instructions})", times, (KEPT, HALF), "ms")
