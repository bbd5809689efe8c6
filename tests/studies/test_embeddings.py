"""The picture of novel classes: a plane that separates classes and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from docs.studies.embeddings import EmbeddedClasses, discriminant_plane, plane, side_by_side


def classes(noise: float, count=4, images=30, width=200) -> EmbeddedClasses:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(count, 1, 1, width))
    noises = np.where(np.arange(width) < 3, 30.0, noise)  # in three directions much, whatever the class
    features = means + noises * rng.normal(size=(count, 2, images, width))
    fitted, shown = (features[:, side].reshape(count * images, width) for side in (0, 1))
    return EmbeddedClasses(fitted, shown, np.repeat(np.arange(count), images), [f"c{n}" for n in range(count)])


def separation(points, labels) -> float:
    means = np.stack([points[labels == label].mean(0) for label in np.unique(labels)])
    within = sum(((points[labels == n] - m) ** 2).sum() for n, m in enumerate(means)) / len(points)
    return float(((means - means.mean(0)) ** 2).sum() / len(means) / within)


def test_the_plane_separates_classes_and_nothing_else():
    given = classes(1.0)
    assert separation(plane(given, "lda"), given.labels) > 5 > 0.5 > separation(plane(given, "pca"), given.labels)
    rng = np.random.default_rng(1)
    noise = EmbeddedClasses(rng.normal(size=(120, 200)), rng.normal(size=(120, 200)), given.labels, given.names)
    assert separation(plane(noise, "lda"), noise.labels) < 0.1
    assert separation(discriminant_plane(noise.fitted, noise.labels, noise.fitted), noise.labels) > 1


def test_the_plane_against_the_definition():
    """In two dimensions, without shrinkage to speak of, the first axis is within^-1 (m1 - m2)."""
    rng = np.random.default_rng(2)
    covariance = np.array([[4.0, 1.9], [1.9, 1.0]])
    features = np.concatenate([rng.multivariate_normal(m, covariance, 4000) for m in ([0, 0], [1, 0])])
    labels = np.repeat([0, 1], 4000)
    points = discriminant_plane(features, labels, features)
    within = np.cov(features[:4000].T, bias=True) / 2 + np.cov(features[4000:].T, bias=True) / 2
    within += 0.1 * np.trace(within) / 2 * np.eye(2)
    axis = np.linalg.solve(within, features[4000:].mean(0) - features[:4000].mean(0))
    expected = (features - features.mean(0)) @ (axis / np.sqrt(axis @ within @ axis))
    assert min(np.abs(points[:, 0] - sign * expected).max() for sign in (1, -1)) < 1e-9
    assert np.abs(points[:, 1]).max() == 0


@pytest.mark.parametrize("projection", ["lda", "pca"])
def test_the_picture(projection):
    panels = [("meta", classes(1.0)), ("classical", classes(3.0))]
    svg = side_by_side(panels, "Novel classes", projection, "svg")
    assert svg == side_by_side(panels, "Novel classes", projection, "svg") and svg.count(b"<svg") == 1
    assert side_by_side(panels[:1], kind="png")[:4] == b"\x89PNG"
