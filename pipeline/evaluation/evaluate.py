"""Evaluation spread over the cluster: ranges of episodes as Ray tasks, the same episodes for every model."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.data.dataset import check_shards, class_table, open_dataset, read_manifest
from pipeline.data.episodes import EpisodeSpec, check_spec
from pipeline.data.manifest import Manifest
from pipeline.errors import PipelineError
from pipeline.evaluation.embedded import Embeddings
from pipeline.evaluation.episodic import episode_accuracies
from pipeline.evaluation.model import Built, Model
from pipeline.evaluation.spread import EmbeddedSplits, awaited, cores, fetched, parts
from pipeline.evaluation.statistics import Estimate, estimate

PART = 50  # episodes per task, at most


@dataclass(frozen=True)
class EpisodicProtocol:
    """What to measure: episodes of one shape on one split."""

    dataset: str  # folder or URI
    split: str
    way: int
    shot: int
    query: int
    episodes: int = 1000
    seed: int = 2000
    tasks: int = 20  # episodes computed at once
    balanced_query: bool = True
    resize: bool = False  # images of another shape than the model's are brought to it; else they are refused

    @property
    def spec(self) -> EpisodeSpec:
        return EpisodeSpec(self.way, self.shot, self.query, 1, self.balanced_query)

    @property
    def name(self) -> str:
        return f"{self.way}-way {self.shot}-shot"


@dataclass(frozen=True)
class Result:
    """The accuracy in every episode."""

    protocol: EpisodicProtocol
    accuracies: np.ndarray = field(repr=False)  # [episodes] float64

    @property
    def estimate(self) -> Estimate:
        return estimate(self.accuracies)

    def summary(self) -> dict[str, Any]:
        q = self.protocol
        keys = ("split", "way", "shot", "query", "episodes", "seed")
        found = self.estimate
        return {**{key: getattr(q, key) for key in keys}, "accuracy": found.mean, "interval": found.interval}


def evaluate(
    model: Model, protocols: list[EpisodicProtocol], gpus: float = 0.0, once: EmbeddedSplits | None = None
) -> list[Result]:
    """Measure by all protocols at once, on every core of the cluster (or on GPUs, ``gpus`` a task).

    ``once``: of this model, where others look at the same images before or after.
    """
    for protocol in protocols:
        check(model, protocol)
    once, embedded = once or EmbeddedSplits(model, gpus), {}
    for dataset, split in dict.fromkeys((q.dataset, q.split) for q in protocols):
        check_shards(dataset)
        shared = [q for q in protocols if (q.dataset, q.split) == (dataset, split)]
        images = sum(q.episodes * q.way * (q.shot + q.query) for q in shared)
        found = once.reference(dataset, split, images)
        embedded[dataset, split] = None if found is None else found[1]
    answers, episodes = [], dict[Any, int]()
    for protocol in protocols:
        numbers = parts(protocol.episodes, min(PART, -(-protocol.episodes // cores())))
        vectors = embedded[protocol.dataset, protocol.split]
        answers.append(once.spread(_answer, numbers, protocol, model.shape, vectors))
        episodes.update(zip(answers[-1], map(len, numbers), strict=True))
    for done in awaited(list(episodes)):
        answered = sum(episodes[piece] for piece in done)
        print(f"{answered:,} of {sum(episodes.values()):,} episodes answered", flush=True)
    return [Result(q, np.concatenate(fetched(found))) for q, found in zip(protocols, answers, strict=True)]


def check(model: Model, protocol: EpisodicProtocol) -> None:
    """Refuse what the split or the method cannot serve, before anything is computed."""
    manifest = read_manifest(protocol.dataset)
    if not protocol.resize:
        check_images(model, manifest)
    check_spec(class_table(manifest, protocol.split), protocol.spec, "")
    fixed = model.build()[0].fixed_way
    if fixed is not None and fixed != protocol.way:
        name = model.spec["method"]["name"]
        raise PipelineError(f"way={protocol.way}: {name} trained with {fixed} ways answers for {fixed} classes only")


def check_images(model: Model, manifest: Manifest) -> None:
    """Refuse a dataset whose images are not of the shape that the model was trained on."""
    shape = model.shape
    if shape != manifest.shape:
        want, got = (" x ".join(map(str, sizes)) for sizes in (shape, manifest.shape))
        raise PipelineError(
            f"dataset {manifest.name!r} has images of {got} (channels x height x width), {model.label} takes {want}: "
            "ingest it again in that shape, under another data.name"
        )


def _answer(
    built: Built, numbers: range, how: EpisodicProtocol, shape: tuple[int, int, int], vectors: np.ndarray | None
) -> np.ndarray:
    """The accuracy in each of the episodes ``numbers``; ``vectors``: the split's embeddings, where they are known."""
    method, preprocess, device = built
    dataset = open_dataset(how.dataset, shape)
    table = class_table(dataset.manifest, how.split)
    embeddings = None if vectors is None else Embeddings(vectors, table)
    return episode_accuracies(
        method, preprocess, dataset, table, how.spec, how.seed, np.asarray(numbers), how.tasks, device, embeddings
    )
