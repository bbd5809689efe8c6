"""The rows for a GPU: bfloat16 and compiled, as share of what the chip's matrix units were measured to do."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from docs.studies.benchmark import made
from docs.studies.benchmark.apart import Apart, Together
from docs.studies.benchmark.rows import Bench, Finding, NotHere, ratio, row
from docs.studies.benchmark.timing import interleaved
from pipeline.data.dataset import Dataset
from pipeline.data.stream import Stream
from pipeline.nets.preprocess import Preprocess

PACKED = 4  # trials on one GPU
RESNET = {"name": "resnet12"}


def available(bench: Bench) -> str:
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise NotHere("no CUDA device")
    return bench.device


def timed(function: Callable[[], object], times: int, device: str) -> float:
    """Seconds a call, once the device is done with all of them."""
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        function()
    _synchronize(device)
    return (time.perf_counter() - began) / times


def step_of(
    device: str, method: str, tasks: int, shape: made.Shape, compiled: bool, **options: Any
) -> Callable[[], None]:
    """A training step under bfloat16 autocast on a batch that is there already."""
    form = {key: options.pop(key) for key in ("way", "shot", "query") if key in options}
    model = made.model(method, shape, form.get("way", 5), **options).to(device).train()
    batch = made.episodes(tasks, shape, **form).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss, _ = forward(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def step_seconds(device: str, times: int, *arguments: Any, **options: Any) -> Iterator[float]:
    step = step_of(device, *arguments, **options)
    while True:
        yield timed(step, times, device)


@row("gpu")
def gpu_maml(bench: Bench) -> Iterator[Finding]:
    """MAML by vmap against the loop over tasks, second order, meta-batch 32."""
    device, times = available(bench), bench.count(10)
    tasks = bench.count(32, 2)
    steps = {
        form: step_of(device, "maml", tasks, made.OMNIGLOT, False, inner_steps=5, inner_loop=form)
        for form in ("loop", "vmap")
    }
    sides = {name: functools.partial(_milliseconds, step, times, device) for name, step in steps.items()}
    found = interleaved(sides, bench.repetitions)
    yield ratio(
        f"MAML second-order meta-step of {tasks} tasks, Conv-4-64, 5 inner steps: vmap against the loop",
        found, ("loop", "vmap"), "ms",
    )  # fmt: skip


def _share_of_chip(bench: Bench, method: str, way: int, shot: int, query: int, **options: Any) -> Iterator[Finding]:
    device, times = available(bench), bench.count(10)
    tasks, form = bench.count(8), {"way": way, "shot": shot, "query": query}
    backbone = {**RESNET, **options.pop("backbone", {})}
    step = step_of(device, method, tasks, made.MINI_IMAGENET, False, backbone=backbone, **form, **options)
    with FlopCounterMode(display=False) as counter:
        step()
    operations = counter.get_total_flops()
    fast = step_of(device, method, tasks, made.MINI_IMAGENET, device == "cuda", backbone=backbone, **form, **options)
    size = 8192 if device == "cuda" else 512
    square = torch.rand(size, size, device=device, dtype=torch.bfloat16)
    sides = {
        "step": lambda: operations / timed(fast, times, device) / 1e12,
        "matrix product": lambda: 2 * size**3 / timed(lambda: square @ square, times, device) / 1e12,
    }
    found = interleaved(sides, bench.repetitions, warm_up=2)
    rates = [tasks / (operations / (rate * 1e12)) for rate in found["step"]]
    name = f"{method}, ResNet-12, 84x84x3 {way}-way {shot}-shot {query}-query, {tasks} episodes a step, bfloat16"
    yield Finding(name, rates, "episodes/s")
    yield ratio(f"{name}: share of the measured matrix rate", found, ("step", "matrix product"), "TFLOP/s")


@row("gpu")
def gpu_prototypical(bench: Bench) -> Iterator[Finding]:
    """Prototypical networks with ResNet-12 at 84x84."""
    yield from _share_of_chip(bench, "prototypical", 5, 5, 15)


@row("gpu")
def gpu_metaopt(bench: Bench) -> Iterator[Finding]:
    """MetaOptNet-SVM with ResNet-12 at 84x84."""
    yield from _share_of_chip(bench, "metaopt", 5, 15, 6)


@row("gpu", needs_ray=True)
def gpu_resident(bench: Bench) -> Iterator[Finding]:
    """The dataset resident on the device against streamed to it."""
    device, steps = available(bench), bench.count(200, 4)
    uri = made.dataset(bench.folder, made.LARGE)
    data, planner = Dataset(uri, verify=False), made.planner(uri, 8)
    preprocess = Preprocess().to(device)

    def rate(materialize: str) -> float:
        """Episodes a second through the stream and the preprocessing."""
        batches = iter(Stream(data, planner, 0, steps + 1, device=device, materialize=materialize))
        next(batches)
        _synchronize(device)
        began = time.perf_counter()
        for _, batch in batches:
            preprocess(batch.query)  # type: ignore[union-attr]
        _synchronize(device)
        return 8 * steps / (time.perf_counter() - began)

    sides = {"resident": lambda: rate("device"), "streamed": lambda: rate("worker")}
    found = interleaved(sides, bench.repetitions)
    yield ratio(
        "84x84x3 episodes from the device's memory, against streamed to it",
        found, ("resident", "streamed"), "episodes/s",
    )  # fmt: skip


@row("gpu")
def gpu_packed(bench: Bench) -> Iterator[Finding]:
    """Four trials on one GPU at once against one after the other."""
    device, times = available(bench), bench.count(50)
    arguments = (device, times, "prototypical", 4, made.OMNIGLOT, False)
    with contextlib.ExitStack() as stack:
        trials = [stack.enter_context(Apart(step_seconds, *arguments)) for _ in range(PACKED)]
        at_once, alone = Together(trials), trials[0]
        sides = {"one after the other": lambda: 1e3 * PACKED * alone(), "at once": lambda: 1e3 * at_once()}
        found = interleaved(sides, bench.repetitions)
    yield ratio(
        f"{PACKED} trials packed on a GPU, against one after the other (prototypical, Conv-4-64, 28x28)",
        found, ("one after the other", "at once"), "ms a step of all",
    )  # fmt: skip


def _milliseconds(function: Callable[[], object], times: int, device: str) -> float:
    return 1e3 * timed(function, times, device)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
