"""Features once: an actor of jobs.embed against a bare loop of the same network, and episodes on what it made."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from docs.studies.benchmark import made
from docs.studies.benchmark.apart import Apart
from docs.studies.benchmark.rows import Bench, Finding, ratio, row
from docs.studies.benchmark.timing import Sides, interleaved
from pipeline.data.dataset import Dataset, class_table
from pipeline.data.features import Network
from pipeline.data.write import Target
from pipeline.evaluation.embed_dataset import Embedder, Embedding, embed_dataset, load_network
from pipeline.evaluation.episodic import episode_accuracies
from pipeline.evaluation.evaluate import EpisodicProtocol
from pipeline.model import build_model, build_preprocess
from pipeline.nets import build_backbone

BACKBONE, INPUT = {"name": "conv4"}, {"shape": list(made.MINI_IMAGENET), "scaling": "unit"}


def embedding(uri: str) -> Embedding:
    torch.manual_seed(0)
    network = Network(BACKBONE, INPUT, dict(build_backbone(BACKBONE, made.MINI_IMAGENET).state_dict()))
    return Embedding.of(uri, network, None, 2**26, gpu=False)


def looped(how: Embedding, images: int) -> Iterator[float]:
    """CPU seconds of a loop of the network over images that lie in memory, in the same batches."""
    network, preprocess = load_network(how.network), build_preprocess({"input": how.network.input})
    pixels = torch.from_numpy(Dataset(how.dataset, verify=False).gather(np.arange(images)))
    while True:
        began = time.process_time()
        with torch.inference_mode():
            for part in pixels.split(how.batch):
                network(preprocess(part))
        yield time.process_time() - began


def acted(how: Embedding, images: int) -> Iterator[float]:
    """The same of an actor, which reads the images and writes the shard."""
    while True:
        with tempfile.TemporaryDirectory() as place:
            actor = Embedder(how, place, None, "0" * 16, gpu=False)
            work = {"number": 0, "view": 0, "start": 0, "stop": images}
            began = time.process_time()
            actor({name: np.asarray([value]) for name, value in work.items()})
            yield time.process_time() - began


def answered(place: str, episodes: int) -> Iterator[float]:
    """Episodes per CPU second of a prototypical network on features."""
    dataset = Dataset(place, verify=False)
    spec = {"method": {"name": "prototypical"}, "backbone": {"name": "features"},
            "input": {"shape": list(dataset.shape), "scaling": "features"}}  # fmt: skip
    method, preprocess, table = build_model(spec).eval(), build_preprocess(spec), class_table(dataset.manifest, "test")
    protocol, numbers = EpisodicProtocol(place, "test", 5, 1, 15), np.arange(episodes)
    while True:
        began = time.process_time()
        episode_accuracies(method, preprocess, dataset, table, protocol.spec, 0, numbers, protocol.tasks)
        yield episodes / (time.process_time() - began)


@row("features", needs_ray=True)
def features_once(bench: Bench) -> Iterator[Finding]:
    """An actor of jobs.embed against a bare loop of the network, and episodes on its features."""
    how, images = embedding(made.dataset(bench.folder, made.LARGE)), bench.count(1000, 50)
    with Apart(looped, how, images) as loop, Apart(acted, how, images, product=True) as actor:
        sides: Sides = {"loop": loop, "jobs.embed": actor}
        found = interleaved(sides, bench.repetitions)
    yield ratio(
        f"features of {images:,} images (Conv-4-64, 84x84, {how.batch} at once): an actor of jobs.embed, which reads "
        "and writes, against a loop over images in memory, one core each", found, ("loop", "jobs.embed"), "CPU s",
        least=0.9,
    )  # fmt: skip
    place = Path(bench.folder) / "datasets" / "features"
    target = Target(str(place), overwrite=True, resume=True)
    made_here = embed_dataset(how, target, "features", {"kind": "features"}, say=lambda line: None)
    episodes = bench.count(1000, 20)
    with Apart(answered, str(place), episodes, product=True) as answers:
        rates = [answers() for _ in range(bench.repetitions)]
    what = f"episodes a CPU second on {made_here.shape[0]:,} features (prototypical, 5-way 1-shot 15-query)"
    yield Finding(what, rates, "1/s", 1000)
