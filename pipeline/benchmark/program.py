"""Trials of a search as one program with a dimension of trials, against one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.benchmark import made
from pipeline.benchmark.apart import Apart
from pipeline.benchmark.rows import Bench, Finding, NotHere, ratio, row
from pipeline.benchmark.timing import Sides, interleaved, repeatedly
from pipeline.config import compose, validate
from pipeline.search.program import arrange
from pipeline.training.config import TrainConfig
from pipeline.training.learner import Learner

TRIALS = 8
APART, ONE = "one after the other", "one program"
FORMS = {
    "prototypical, four layers without convolutions": (
        "method.scale", 1.0, ["method=prototypical", "backbone=mlp", "backbone.widths=[256,128,64,64]"]
    ),
    "MAML with one second-order step, one layer": ("method.inner_lr", 0.05, ["method=maml", "backbone=mlp"]),
    "prototypical, Conv-4-64": ("method.scale", 1.0, ["method=prototypical"]),
    "MAML with one second-order step, strided Conv-4-64": (
        "method.inner_lr", 0.05, ["method=maml", "backbone=conv4_strided"]
    ),
}  # fmt: skip


def trial_steps(form: str, batched: bool, device: str, steps: int) -> Iterator[float]:
    """Seconds that one training step of all trials takes, 5-way 1-shot 5-query with 2 tasks of 28x28 images."""
    key, unit, options = FORMS[form]
    learners = []
    for number in range(TRIALS):
        own = [f"{key}={unit * (1 + number)}", "cluster.workers=1", "data=omniglot"]
        config = validate(TrainConfig, compose("train", [*options, *own]))
        images = {"shape": list(made.OMNIGLOT), "scaling": "unit"}
        spec = {"method": config.method, "backbone": config.backbone, "input": images, "way": 5, "shot": 1}
        learners.append(Learner(config, spec, device=device))
    arrange(learners, batched)
    batch = made.episodes(2, made.OMNIGLOT, way=5, shot=1, query=5)
    batch = replace(batch, support=_pixels(batch.support), query=_pixels(batch.query)).to(device)

    def step() -> None:
        for learner in learners:
            learner.train_step(batch)
        if device == "cuda":
            torch.cuda.synchronize()

    return repeatedly(step, steps)


def _pixels(images: Tensor) -> Tensor:
    return (255 * images).to(torch.uint8)


def _findings(bench: Bench, device: str, forms: list[str]) -> Iterator[Finding]:
    for form in forms:
        steps = bench.count(10)
        with (
            Apart(trial_steps, form, False, device, steps, product=True) as apart,
            Apart(trial_steps, form, True, device, steps, product=True) as one,
        ):
            sides: Sides = {APART: apart, ONE: one}
            found = interleaved(sides, bench.repetitions)
        found = {name: [1e3 * value for value in values] for name, values in found.items()}
        yield ratio(
            f"a training step of {TRIALS} trials as one program, against one after the other ({form}; "
            "5-way 1-shot 5-query, 2 tasks)",
            found, (APART, ONE), "ms",
        )  # fmt: skip


@row("campaign")
def one_program(bench: Bench) -> Iterator[Finding]:
    """Trials that differ in scalars alone as one program, against one after the other, on one core."""
    yield from _findings(bench, "cpu", list(FORMS))


@row("gpu")
def gpu_one_program(bench: Bench) -> Iterator[Finding]:
    """Trials that differ in scalars alone as one program, against one after the other."""
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise NotHere("no CUDA device")
    yield from _findings(bench, bench.device, [form for form in FORMS if "Conv" in form])
