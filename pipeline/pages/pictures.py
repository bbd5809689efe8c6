"""The pictures of a trained model that a run's report holds."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from pipeline.batch import Episodes
from pipeline.charts.accuracy import accuracy_by_shot, lines_of
from pipeline.charts.classes import episode_picture, project, projection
from pipeline.data.augment import quarter_turns
from pipeline.data.batches import class_turns, to_batch
from pipeline.data.dataset import Dataset, class_table
from pipeline.data.episodes import EpisodeSpec, bounds, plan_episodes
from pipeline.methods.base import Method
from pipeline.nets.preprocess import Preprocess

PROJECTED_CLASSES, PROJECTED_IMAGES, QUERIES = 8, 20, 6


def draw_pictures(
    method: Method, preprocess: Preprocess, dataset: Dataset, split: str, results: list[dict[str, Any]]
) -> dict[str, bytes]:
    """File name to content: accuracy by way and shot, embeddings of unseen classes, an episode with its answers."""
    embeddings, labels, names = _embeddings(method, preprocess, dataset, split)
    points, variance = project(embeddings)
    episode = _episode(method, preprocess, dataset, split)
    unseen = f"Classes of split {split!r} that training never saw"
    out = {}
    kinds: tuple[Literal["svg", "png"], ...] = ("svg", "png")
    for kind in kinds:
        out[f"accuracy.{kind}"] = accuracy_by_shot(lines_of(results), "Accuracy by way and shot", kind)
        out[f"embeddings.{kind}"] = projection(points, labels, names, variance.tolist(), unseen, kind)
        if episode is not None:
            out[f"episode.{kind}"] = episode_picture(**episode, title="An episode", kind=kind)
    return out


def _embeddings(
    method: Method, preprocess: Preprocess, dataset: Dataset, split: str
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Backbone features [N, D] of some classes of a split, their places [N] in the list of names."""
    manifest, table = dataset.manifest, class_table(dataset.manifest, split)
    chosen = np.linspace(0, len(table) - 1, min(PROJECTED_CLASSES, len(table))).astype(int)
    each = min(PROJECTED_IMAGES, int(table.counts[chosen].min()))
    rows = (table.starts[chosen][:, None] + np.arange(each)).reshape(-1)
    turns = class_turns(np.repeat(table.ids[chosen], each), manifest.rotations)
    images = preprocess(quarter_turns(torch.from_numpy(dataset.gather(rows)), turns))
    with torch.no_grad():
        features = method.extractor()(images)
    names = [manifest.class_names[index // len(manifest.rotations)] for index in table.ids[chosen]]
    return features.numpy(), np.repeat(np.arange(len(chosen)), each), names


def _episode(method: Method, preprocess: Preprocess, dataset: Dataset, split: str) -> dict[str, Any] | None:
    """The first 1-shot episode of a split and the method's answers; None where the split cannot serve one."""
    table = class_table(dataset.manifest, split)
    spec = EpisodeSpec(method.fixed_way or min(5, len(table)), 1, QUERIES)
    if len(table) < bounds(spec.way)[1] or int(table.counts.min()) <= QUERIES:
        return None
    plan = plan_episodes(table, spec, 0, np.asarray([0]))
    batch = to_batch(plan, torch.from_numpy(dataset.gather(plan.rows)), dataset.manifest.rotations)
    assert isinstance(batch, Episodes)
    with torch.no_grad():
        state = method.adapt(preprocess(batch.support), batch.support_labels, batch.way)
        answers = method.classify(state, preprocess(batch.query)).argmax(-1)
    return {
        "support": batch.support[0].numpy(),
        "support_labels": batch.support_labels[0].numpy(),
        "query": batch.query[0].numpy(),
        "query_labels": batch.query_labels[0].numpy(),
        "answers": answers[0].numpy(),
    }
