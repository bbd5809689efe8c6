"""The pictures of a trained model that a run's report holds."""

from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.batch import Episodes
from pipeline.charts.accuracy import accuracy_by_shot, lines_of
from pipeline.charts.classes import episode_picture, project, projection
from pipeline.charts.style import in_both_kinds
from pipeline.data.batches import to_batch
from pipeline.data.dataset import Dataset, class_table
from pipeline.data.episodes import EpisodeSpec, bounds, plan_episodes
from pipeline.data.features import Pictures
from pipeline.data.manifest import FEATURES
from pipeline.evaluation.embedded import Embeddings, class_features
from pipeline.methods.base import Method
from pipeline.nets.preprocess import Preprocess
from pipeline.pages.card import Looker

PROJECTED_CLASSES, PROJECTED_IMAGES, QUERIES = 8, 20, 6


def draw_pictures(
    method: Method,
    preprocess: Preprocess,
    dataset: Dataset,
    split: str,
    results: list[dict[str, Any]],
    embeddings: Embeddings | None = None,
) -> dict[str, bytes]:
    """File name to content: accuracy by way and shot, embeddings of unseen classes, an episode with its answers.

    ``embeddings``: of the split, where they are known.
    """
    manifest, table = dataset.manifest, class_table(dataset.manifest, split)
    features, chosen, each = class_features(
        method, preprocess, dataset, table, PROJECTED_CLASSES, PROJECTED_IMAGES, embeddings
    )
    points, variance = project(features)
    labels = np.repeat(np.arange(len(chosen)), each)
    names = [manifest.class_names[index // len(manifest.rotations)] for index in table.ids[chosen]]
    episode = _episode(method, preprocess, dataset, split, embeddings)
    unseen = f"Classes of split {split!r} that training never saw"
    charts = {
        "accuracy": partial(accuracy_by_shot, lines_of(results), "Accuracy by way and shot"),
        "embeddings": partial(projection, points, labels, names, variance.tolist(), unseen),
    }
    if episode is not None:
        charts["episode"] = partial(episode_picture, **episode, title="An episode")
    return in_both_kinds(charts)


def _episode(
    method: Method, preprocess: Preprocess, dataset: Dataset, split: str, embeddings: Embeddings | None
) -> dict[str, Any] | None:
    """The first 1-shot episode of a split and the method's answers; None where the split cannot serve one."""
    table = class_table(dataset.manifest, split)
    spec = EpisodeSpec(method.fixed_way or min(5, len(table)), 1, QUERIES)
    if len(table) < bounds(spec.way)[1] or int(table.counts.min()) <= QUERIES:
        return None
    plan = plan_episodes(table, spec, 0, np.asarray([0]))
    [answered] = Looker(method, preprocess, dataset, embeddings).answers(table, plan)
    pixels = torch.from_numpy(Pictures(dataset).of(plan.rows.reshape(-1)))
    turned = [0] if dataset.manifest.encoding == FEATURES else dataset.manifest.rotations
    shown = to_batch(plan, pixels, turned)
    assert isinstance(shown, Episodes)
    return {
        "support": shown.support[0].numpy(),
        "support_labels": shown.support_labels[0].numpy(),
        "query": shown.query[0].numpy(),
        "query_labels": shown.query_labels[0].numpy(),
        "answers": answered.answers,
    }
