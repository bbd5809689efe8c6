"""Accuracy over episodes: the same episodes for every candidate, in batches of tasks."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeline.batch import Episodes
from pipeline.data.batches import read_batch
from pipeline.data.dataset import ClassTable, Dataset
from pipeline.data.episodes import EpisodeSpec, Plan, bounds, plan_episodes
from pipeline.evaluation.embedded import Embeddings, given_embeddings
from pipeline.methods.base import Method, one_task_at_once
from pipeline.nets.preprocess import Preprocess

IMAGES = 2000  # at once: enough to keep a GPU busy, and bounded memory for large ways


@contextmanager
def evaluating(method: Method) -> Iterator[None]:
    """Evaluation mode, restored to what it was."""
    was = method.training
    method.eval()
    try:
        yield
    finally:
        method.train(was)


def episode_accuracies(
    method: Method,
    preprocess: Preprocess,
    dataset: Dataset,
    table: ClassTable,
    spec: EpisodeSpec,
    seed: int,
    numbers: np.ndarray,
    chunk: int = 1,
    device: torch.device | str = "cpu",
    embeddings: Embeddings | None = None,
) -> np.ndarray:
    """Share of right answers in each of the episodes ``numbers`` [n]: float64 [n].

    At most ``chunk`` episodes, and about ``IMAGES`` images, go through the method at once (one episode, where the spec
    draws their shapes from ranges, or where answers would depend on the episodes beside it): it decides speed and
    memory, never what comes out. With ``embeddings`` of the split no image goes through the backbone again.
    """
    spec = replace(spec, tasks=1)
    size = bounds(spec.way)[1] * (bounds(spec.shot)[1] + bounds(spec.query)[1])
    chunk = max(1, min(chunk, IMAGES // size)) if spec.fixed and not one_task_at_once(method) else 1
    parts = []
    with evaluating(method):
        for start in range(0, len(numbers), chunk):
            plan = plan_episodes(table, spec, seed, numbers[start : start + chunk])
            logits, labels = answer(method, preprocess, dataset, plan, device, embeddings)
            parts.append((logits.argmax(-1) == labels).double().mean(1).cpu().numpy())
    return np.concatenate(parts) if parts else np.empty(0)


@torch.no_grad()
def answer(
    method: Method,
    preprocess: Preprocess,
    dataset: Dataset,
    plan: Plan,
    device: torch.device | str = "cpu",
    embeddings: Embeddings | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits [E, Q, way] of the queries of a plan's episodes, and their labels int64 [E, Q]."""
    labels = torch.from_numpy(np.array(plan.labels)).to(device)
    with given_embeddings(method) if embeddings else nullcontext():
        if embeddings:
            images = embeddings.of(plan).to(device)
        else:
            batch = read_batch(dataset, plan, device)
            assert isinstance(batch, Episodes)
            images = preprocess(torch.cat([batch.support, batch.query], dim=1))
        state = method.adapt(images[:, : plan.support], labels[:, : plan.support], plan.way)
        return method.classify(state, images[:, plan.support :]), labels[:, plan.support :]
