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
from pipeline.evaluation.episodic import episode_accuracies
from pipeline.evaluation.statistics import Estimate, estimate
from pipeline.model import build_model, build_preprocess

PART = 50  # episodes a task, at most


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
    parts = []
    for question in questions:
        share = min(PART, -(-question.episodes // int(max(1, ray.cluster_resources().get("CPU", 1)))))
        for start in range(0, question.episodes, share):
            numbers = np.arange(start, min(start + share, question.episodes))
            task = _evaluate_part.options(num_cpus=1, num_gpus=gpus)
            parts.append((question, task.remote(held, question, numbers, gpus > 0)))
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


@ray.remote
def _evaluate_part(held: Any, question: Question, numbers: np.ndarray, gpu: bool) -> np.ndarray:
    model, seed = held
    torch.set_num_threads(1)
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(seed)
    method = build_model(model.spec)
    if model.weights is not None:
        method.load_state_dict(model.weights)
    preprocess = build_preprocess(model.spec).to(device)
    dataset = open_dataset(question.dataset)
    table = class_table(dataset.manifest, question.split)
    return episode_accuracies(
        method.to(device), preprocess, dataset, table, question.spec, question.seed, numbers, question.tasks, device
    )
