"""Evaluation spread over the cluster: ranges of episodes as Ray tasks, the same episodes for every model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from pipeline.data.dataset import class_table, open_dataset, read_manifest
from pipeline.data.episodes import EpisodeSpec, check_spec
from pipeline.errors import PipelineError
from pipeline.evaluation.embedded import Embeddings, embed_part, possible
from pipeline.evaluation.episodic import episode_accuracies
from pipeline.evaluation.statistics import Estimate, estimate
from pipeline.methods.base import Method
from pipeline.model import build_model, build_preprocess
from pipeline.nets.preprocess import Preprocess

PART = 50  # episodes per task, at most
EMBED_PART = 1000  # images per task, at least


@dataclass(frozen=True)
class Model:
    """Weights and what builds the method around them."""

    spec: dict[str, Any]
    weights: dict[str, Tensor] | None  # None: untrained, as the seed makes it
    label: str = "model"
    dataset: str | None = None  # what it was trained on

    def untrained(self) -> Model:
        return Model(self.spec, None, "untrained", self.dataset)


@dataclass(frozen=True)
class Question:
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

    @property
    def spec(self) -> EpisodeSpec:
        return EpisodeSpec(self.way, self.shot, self.query, 1, self.balanced_query)

    @property
    def name(self) -> str:
        return f"{self.way}-way {self.shot}-shot"


@dataclass(frozen=True)
class Result:
    """The answer to a question, with the accuracy of every episode."""

    question: Question
    accuracies: np.ndarray = field(repr=False)  # [episodes] float64

    @property
    def estimate(self) -> Estimate:
        return estimate(self.accuracies)

    def summary(self) -> dict[str, Any]:
        q = self.question
        keys = ("split", "way", "shot", "query", "episodes", "seed")
        found = self.estimate
        return {**{key: getattr(q, key) for key in keys}, "accuracy": found.mean, "interval": found.interval}


def evaluate(model: Model, questions: list[Question], gpus: float = 0.0, seed: int = 0) -> list[Result]:
    """Answer all questions at once, on every core of the cluster (or on GPUs, ``gpus`` a task)."""
    for question in questions:
        check(model, question)
    held = ray.put((model, seed))
    embedded = {
        (dataset, split): _embed(held, model, [q for q in questions if (q.dataset, q.split) == (dataset, split)], gpus)
        for dataset, split in dict.fromkeys((q.dataset, q.split) for q in questions)
    }
    parts = []
    for question in questions:
        vectors = embedded[question.dataset, question.split]
        share = min(PART, -(-question.episodes // int(max(1, ray.cluster_resources().get("CPU", 1)))))
        for start in range(0, question.episodes, share):
            numbers = np.arange(start, min(start + share, question.episodes))
            task = _evaluate_part.options(num_cpus=1, num_gpus=gpus)
            parts.append((question, task.remote(held, question, numbers, gpus > 0, vectors)))
    answers: dict[int, list[np.ndarray]] = {}
    for question, reference in parts:
        answers.setdefault(id(question), []).append(ray.get(reference))
    return [Result(question, np.concatenate(answers[id(question)])) for question in questions]


def check(model: Model, question: Question) -> None:
    """Refuse what the split or the method cannot serve, before anything is computed."""
    table = class_table(read_manifest(question.dataset), question.split)
    check_spec(table, question.spec, "evaluation")
    fixed = build_model(model.spec).fixed_way
    if fixed is not None and fixed != question.way:
        name = model.spec["method"]["name"]
        raise PipelineError(f"way={question.way}: {name} trained with {fixed} ways answers for {fixed} classes only")


def _embed(held: Any, model: Model, questions: list[Question], gpus: float) -> Any:
    """A reference to the embeddings of the split that all ``questions`` share; None where they would not pay."""
    first = questions[0]
    table = class_table(read_manifest(first.dataset), first.split)
    if not possible(build_model(model.spec), table, sum(q.episodes * q.way * (q.shot + q.query) for q in questions)):
        return None
    total, cores = int(table.counts.sum()), int(max(1, ray.cluster_resources().get("CPU", 1)))
    share = max(EMBED_PART, -(-total // (4 * cores)))
    task = _embed_part.options(num_cpus=1, num_gpus=gpus)
    parts = [
        task.remote(held, first.dataset, first.split, range(start, min(start + share, total)), gpus > 0)
        for start in range(0, total, share)
    ]
    return ray.put(np.concatenate(ray.get(parts)))


@ray.remote
def _embed_part(held: Any, uri: str, split: str, part: range, gpu: bool) -> np.ndarray:
    method, preprocess, device = _load(held, gpu)
    dataset = open_dataset(uri)
    return embed_part(method.eval(), preprocess, dataset, class_table(dataset.manifest, split), part, device)


@ray.remote
def _evaluate_part(held: Any, question: Question, numbers: np.ndarray, gpu: bool, vectors: Any) -> np.ndarray:
    method, preprocess, device = _load(held, gpu)
    dataset = open_dataset(question.dataset)
    table = class_table(dataset.manifest, question.split)
    embeddings = None if vectors is None else Embeddings(vectors, table)
    return episode_accuracies(
        method, preprocess, dataset, table, question.spec, question.seed, numbers, question.tasks, device, embeddings
    )


def _load(held: Any, gpu: bool) -> tuple[Method, Preprocess, torch.device]:
    model, seed = held
    torch.set_num_threads(1)
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(seed)
    method = build_model(model.spec)
    if model.weights is not None:
        method.load_state_dict(model.weights)
    return method.to(device), build_preprocess(model.spec).to(device), device
