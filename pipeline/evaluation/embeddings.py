"""Features of a few novel classes, for looking at extractors beside each other (Goldblum et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.data.dataset import class_table, open_dataset
from pipeline.data.episodes import EpisodeSpec, check_spec, plan_groups
from pipeline.evaluation.extractor import load_extractor
from pipeline.evaluation.model import Model

MOST = 40  # images of a class in a picture, unless told otherwise


@dataclass(frozen=True)
class EmbeddedClasses:
    """Two sets of images of the same classes, N each, as one extractor sees them."""

    fitted: np.ndarray  # [N, D] float64: what axes are fitted to
    shown: np.ndarray  # [N, D] float64: other images
    labels: np.ndarray  # [N] int64, of either; places in names
    names: list[str]


def embed_classes(
    model: Model, uri: str, split: str, classes: int, images: int | None = None, seed: int = 0
) -> EmbeddedClasses:
    """Random classes of a split; equal seeds give equal images, whatever the model.

    Args:
        images: of each class, in each of the two sets; None: half of the smallest class's, at most :data:`MOST`.
    """
    dataset = open_dataset(uri)
    manifest, table = dataset.manifest, class_table(dataset.manifest, split)
    images = min(MOST, int(table.counts.min()) // 2) if images is None else images
    check_spec(table, EpisodeSpec(classes, max(images, 1), max(images, 1)), "embeddings")
    plan = plan_groups(table, seed, 0, 1, classes, 2 * images)
    features = load_extractor(model).features(dataset, plan).double().view(classes, 2, images, -1)
    fitted, shown = (features[:, side].flatten(0, 1).numpy() for side in (0, 1))
    turns = len(manifest.rotations)
    names = []
    for number in plan.classes.reshape(classes, -1)[:, 0]:
        turn = manifest.rotations[number % turns]
        names.append(manifest.class_names[number // turns] + (f" {turn}°" if turn else ""))
    return EmbeddedClasses(fitted, shown, np.repeat(np.arange(classes), images), names)
