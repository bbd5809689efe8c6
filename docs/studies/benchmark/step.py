"""A training step on one core, against what it cannot do without and against the form that others write."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from docs.studies.benchmark import made
from docs.studies.benchmark.apart import Apart
from docs.studies.benchmark.lstm_loop import LoopForm, lstm_learner
from docs.studies.benchmark.rows import Bench, Finding, ratio, row
from docs.studies.benchmark.runs import forward_backward
from docs.studies.benchmark.timing import Sides, interleaved, repeatedly
from pipeline.methods.base import Method

SIDES = ("training step", "forward and backward")


def method_steps(method: Method, shape: made.Shape, steps: int, **form: int) -> Iterator[float]:
    """CPU seconds a step of a method, on one thread: forward, backward and Adam, on a batch that is there already."""
    batch = made.episodes(shape=shape, **form)
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3)
    method.train()

    def step() -> None:
        loss, _ = method(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return repeatedly(step, steps, time.process_time)


def prototypical_steps(steps: int, tasks: int = 1) -> Iterator[float]:
    method = made.model("prototypical", made.OMNIGLOT, way=20)
    return method_steps(method, made.OMNIGLOT, steps, tasks=tasks, way=20, shot=5, query=15)


def backbone_steps(steps: int, images: int = 400) -> Iterator[float]:
    """Seconds a pass of the backbone alone over the images of one such step."""
    backbone = made.model("prototypical", made.OMNIGLOT, way=20).backbone
    pixels = torch.rand(images, *made.OMNIGLOT)
    return repeatedly(lambda: forward_backward(backbone, pixels), steps, time.process_time)


def meta_lstm_steps(steps: int, shot: int, updates: int) -> Iterator[float]:
    net = {"width": 32, "eps": 1e-3}
    method = made.model("meta_lstm", made.MINI_IMAGENET, way=5, inner_steps=updates, backbone=net)
    return method_steps(method, made.MINI_IMAGENET, steps, tasks=1, way=5, shot=shot, query=15)


def meta_lstm_loop(steps: int, shot: int, updates: int) -> Iterator[float]:
    torch.manual_seed(0)
    form = LoopForm(width=32, way=5, updates=updates)
    batch = made.episodes(1, made.MINI_IMAGENET, way=5, shot=shot, query=15)
    task = (batch.support[0], batch.support_labels[0], batch.query[0], batch.query_labels[0])
    return repeatedly(lambda: form.episode(*task), steps, time.process_time)


def learner_passes(steps: int, shot: int, updates: int) -> Iterator[float]:
    """Seconds of what no form of the episode can do without: the learner's passes over support and queries."""
    learner = lstm_learner(32, 5)
    support, query = torch.rand(5 * shot, *made.MINI_IMAGENET), torch.rand(75, *made.MINI_IMAGENET)

    def passes() -> None:
        for images in [support] * updates + [query]:
            forward_backward(learner, images)

    return repeatedly(passes, steps, time.process_time)


@row("step")
def step_limit(bench: Bench) -> Iterator[Finding]:
    """A prototypical step against forward and backward of its backbone alone."""
    steps = bench.count(4)
    with Apart(prototypical_steps, steps, product=True) as step, Apart(backbone_steps, steps) as limit:
        found = interleaved({SIDES[0]: step, SIDES[1]: limit}, bench.repetitions)
    found = {name: [1e3 * value for value in values] for name, values in found.items()}
    yield ratio(
        "prototypical step, 20-way 5-shot 15-query, Conv-4-64, against the backbone's forward and backward alone",
        found, SIDES, "CPU ms",
    )  # fmt: skip


@row("step")
def meta_lstm(bench: Bench) -> Iterator[Finding]:
    """A meta-LSTM episode against the loop form of the public PyTorch port."""
    steps = bench.count(2)
    for form in ((5, 8), (1, 12)):  # shots and updates
        with (
            Apart(meta_lstm_steps, steps, *form, product=True) as ours,
            Apart(meta_lstm_loop, steps, *form) as loop,
            Apart(learner_passes, steps, *form) as limit,
        ):
            sides: Sides = {"loop form": loop, "method=meta_lstm": ours, "its learner's passes alone": limit}
            found = interleaved(sides, bench.repetitions)
        yield ratio(
            f"meta-LSTM training episode, 84x84x3 5-way {form[0]}-shot, {form[1]} updates, against the public PyTorch "
            "port's loop form",
            found, ("loop form", "method=meta_lstm"), "CPU s", least=3,
            note="the port's computation is written down in docs/studies/benchmark/lstm_loop.py",
        )  # fmt: skip
