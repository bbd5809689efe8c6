"""Evaluation on fixed episodes, against a loop over episodes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch

from docs.studies.benchmark import made
from docs.studies.benchmark.apart import Apart
from docs.studies.benchmark.rows import Bench, Finding, ratio, row
from docs.studies.benchmark.timing import Sides, interleaved, seconds
from pipeline.batch import Episodes
from pipeline.data.batches import read_batch
from pipeline.data.dataset import Dataset, class_table
from pipeline.data.episodes import plan_episodes
from pipeline.evaluation.evaluate import EpisodicProtocol, evaluate
from pipeline.evaluation.model import Model
from pipeline.model import build_model, build_preprocess

SPEC = {
    "method": {"name": "prototypical"},
    "backbone": {"name": "conv4"},
    "input": {"shape": list(made.OMNIGLOT), "scaling": "unit"},
}


def looped(protocol: EpisodicProtocol) -> Iterator[float]:
    """Seconds of a loop: gather an episode's images, adapt, classify, count."""
    dataset = Dataset(protocol.dataset, verify=False)
    table = class_table(dataset.manifest, protocol.split)
    torch.manual_seed(0)
    method, preprocess = build_model(SPEC).eval(), build_preprocess(SPEC)
    while True:
        began = time.perf_counter()
        with torch.no_grad():
            for number in range(protocol.episodes):
                plan = plan_episodes(table, protocol.spec, protocol.seed, np.array([number]))
                batch = read_batch(dataset, plan)
                assert isinstance(batch, Episodes)
                state = method.adapt(preprocess(batch.support), batch.support_labels, batch.way)
                logits = method.classify(state, preprocess(batch.query))
                float((logits.argmax(-1) == batch.query_labels).double().mean())
        yield time.perf_counter() - began


@row("evaluation", needs_ray=True)
def episodes_1000(bench: Bench) -> Iterator[Finding]:
    """Evaluation of 1,000 episodes against a loop over episodes."""
    uri = made.dataset(bench.folder, made.SMALL)
    protocol = EpisodicProtocol(uri, "test", 5, 1, 15, bench.count(1000, 10))
    with Apart(looped, protocol, threads=torch.get_num_threads()) as loop:
        sides: Sides = {"loop": loop, "jobs.evaluate": lambda: seconds(lambda: evaluate(Model(SPEC, None), [protocol]))}
        found = interleaved(sides, bench.repetitions)
    yield ratio(
        f"evaluation of {protocol.episodes:,} episodes (prototypical, Conv-4-64, 28x28 5-way 1-shot 15-query), "
        "against a loop over episodes on all cores",
        found, ("loop", "jobs.evaluate"), "s", least=3,
    )  # fmt: skip
