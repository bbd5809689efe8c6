"""A picture of the same novel classes as several extractors see them (as Goldblum et al. 2020 show them).

The plane is that of linear discriminant analysis: of all planes the one in which the classes lie farthest apart for
their own spread, so that no extractor looks worse for a poor choice of axes. It is fitted to other images of the
classes than those that are shown: with more features than images, some plane separates any images it was fitted to,
whatever their labels. Principal components ("pca"), of the images that are shown, do not look at labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch

from pipeline.charts.classes import project
from pipeline.charts.style import FAINT, MARKERS, PALETTE, Kind, chart, render
from pipeline.data.dataset import class_table, open_dataset
from pipeline.data.episodes import EpisodeSpec, check_spec, plan_groups
from pipeline.evaluation.clustering import image_features
from pipeline.evaluation.model import Model, build_on_worker
from pipeline.functional.clustering import class_spread, spread_clustering

AXES = {"lda": ("first discriminant", "second"), "pca": ("first principal component", "second")}
SHRINKAGE = 0.1  # share of the mean variance within classes that is added to that of every direction
MOST_DIRECTIONS = 100  # principal components that discriminant analysis is left with
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
    plan = plan_groups(table, seed, np.arange(1), classes, 2 * images)
    features = image_features(build_on_worker(model), dataset, plan).double().view(classes, 2, images, -1)
    fitted, shown = (features[:, side].flatten(0, 1).numpy() for side in (0, 1))
    turns = len(manifest.rotations)
    names = []
    for number in plan.classes.reshape(classes, -1)[:, 0]:
        turn = manifest.rotations[number % turns]
        names.append(manifest.class_names[number // turns] + (f" {turn}°" if turn else ""))
    return EmbeddedClasses(fitted, shown, np.repeat(np.arange(classes), images), names)


def side_by_side(
    panels: Sequence[tuple[str, EmbeddedClasses]], title: str = "", projection: str = "lda", kind: Kind = "png"
) -> bytes:
    """One panel an extractor, under its heading; a class has the same colour and marker in all of them.

    Every panel has its own scale: only how tight classes are for their distance can be compared.
    """
    with chart(5.2 * len(panels), 5.6) as drawn:
        grid = drawn.subplots(1, len(panels), squeeze=False)[0]
        for axes, (heading, classes) in zip(grid, panels, strict=True):
            points = plane(classes, projection)
            for label, name in enumerate(classes.names):
                mine = points[classes.labels == label]
                axes.scatter(
                    mine[:, 0], mine[:, 1], s=26, color=PALETTE[label % len(PALETTE)],
                    marker=MARKERS[label % len(MARKERS)], alpha=0.75, linewidths=0, label=name,
                )  # fmt: skip
            axes.set_aspect("equal", adjustable="datalim")
            axes.margins(0.06)
            axes.grid(False)
            first, second = AXES[projection]
            axes.set_xlabel(first)
            axes.set_ylabel(second)
            axes.set_xticklabels([])
            axes.set_yticklabels([])
            axes.set_title(heading, pad=20)
            ratio = spread_clustering(class_spread(*map(torch.from_numpy, (classes.shown, classes.labels))))
            note = f"$R_{{FC}}$ of these images, in all {classes.shown.shape[1]:,} dimensions: {ratio:.3g}"
            axes.text(0.0, 1.01, note, transform=axes.transAxes, color=FAINT, fontsize=9, va="bottom",
                      parse_math=True)  # fmt: skip
        handles, names = grid[0].get_legend_handles_labels()
        drawn.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), fontsize=9)
        if title:
            drawn.suptitle(title, x=0.01, ha="left", weight="bold")
        return render(drawn, kind)


def plane(classes: EmbeddedClasses, projection: str) -> np.ndarray:
    """Coordinates [N, 2] of the images that are shown."""
    if projection == "pca":
        return project(classes.shown)[0]
    return discriminant_plane(classes.fitted, classes.labels, classes.shown)


def discriminant_plane(features: np.ndarray, labels: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Coordinates [M, 2] of ``shown`` [M, D] on the first two axes of a discriminant analysis of features [N, D].

    The axes maximise the variance between classes over that within, the latter with :data:`SHRINKAGE`, among the
    features' first principal components; they are scaled to unit variance within, and the largest loading of each is
    positive, so that equal features give equal pictures. The second is zero where there are only two classes.
    """
    centre = features.mean(0)
    _, values, axes = np.linalg.svd(features - centre, full_matrices=False)
    kept = max(1, min(int((values > values[0] * 1e-9).sum()), MOST_DIRECTIONS))
    x = (features - centre) @ axes[:kept].T
    known, place = np.unique(labels, return_inverse=True)
    means = np.stack([x[labels == label].mean(0) for label in known])
    deviations = x - means[place]
    within = deviations.T @ deviations / len(x)
    within += max(SHRINKAGE * np.trace(within) / kept, np.finfo(float).tiny ** 0.5) * np.eye(kept)
    between = (means - means.mean(0)).T @ (means - means.mean(0)) / len(means)
    _, vectors = scipy.linalg.eigh(between, within)
    loadings = np.zeros((features.shape[1], 2))
    found = min(2, len(means) - 1, kept)
    loadings[:, :found] = axes[:kept].T @ vectors[:, ::-1][:, :found]
    signs = np.sign(loadings[np.abs(loadings).argmax(axis=0), np.arange(2)])
    result: np.ndarray = (shown - centre) @ (loadings * np.where(signs == 0, 1, signs))
    return result
