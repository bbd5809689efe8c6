"""How clustered features are: variance within classes over variance between them, and how much the difference of two
classes varies (Goldblum et al. 2020, sections 4.3 and 4.4)."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.functional.distances import root
from pipeline.functional.precision import in_float32

LEAST = 1e-12  # a smaller denominator counts as this
PREFACTORS = ("c_over_n", "one_over_n", "none")


@in_float32
def feature_clustering(features: Tensor, prefactor: str = "c_over_n") -> Tensor:
    """R_FC of features [..., C, N, D] of C classes with N images each: [...]::

        C/N  sum_ij ||f_ij - mu_i||^2 / sum_i ||mu_i - mu||^2

    Args:
        prefactor: "c_over_n": the paper's; "none": the plain ratio; "one_over_n": the ratio of the two variances.
    """
    within, between = _variances(features)
    return _factor(prefactor, *features.shape[-3:-1]) * within / between.clamp(min=LEAST)


@in_float32
def hyperplane_variation(features: Tensor) -> Tensor:
    """R_HV of two images x of one class and two y of another, features [..., 2, 2, D] (class, image): [...]::

    ||(f(x_1) - f(y_1)) - (f(x_2) - f(y_2))|| / (||f(x_1) - f(y_1)|| + ||f(x_2) - f(y_2)||)
    """
    apart, lengths = _differences(features)
    return apart / lengths.clamp(min=LEAST)


@in_float32
def official_feature_clustering(features: Tensor) -> Tensor:
    """As :func:`feature_clustering` of two images of two classes [..., 2, 2, D], the way the official code computes it.

    There it is the function named ``hyperplane_variation``. 1e-6 is added to the denominator.
    """
    within, between = _variances(features)
    return within / (between + 1e-6)


@in_float32
def official_hyperplane_variation(features: Tensor) -> Tensor:
    """As :func:`hyperplane_variation`, the way the official code computes it: about (2 R_HV)^2.

    There it is the function named ``feature_clustering``, on by default. 1e-4 is added to the denominator.
    """
    apart, lengths = _differences(features)
    return (apart / (lengths / 2 + 1e-4)).square()


class Spread(NamedTuple):
    """Of some classes, in ascending order: all that R_FC needs, in float64."""

    ids: Tensor  # int64 [C]
    counts: Tensor  # int64 [C]
    means: Tensor  # [C, D]
    within: Tensor  # [C]: squared distances of the images to the mean of their class, summed


def class_spread(features: Tensor, labels: Tensor) -> Spread:
    """The spread of images [N, D] with labels int64 [N]."""
    ids, position, counts = labels.unique(return_inverse=True, return_counts=True)
    wide = features.double()
    means = wide.new_zeros(len(ids), wide.shape[1]).index_add_(0, position, wide) / counts.unsqueeze(1)
    squares = (wide - means[position]).square().sum(1)
    return Spread(ids, counts, means, wide.new_zeros(len(ids)).index_add_(0, position, squares))


def merge_spreads(parts: Iterable[Spread]) -> Spread:
    """The spread of all images together, where parts may share classes (Chan, Golub & LeVeque 1983)."""
    found: Spread | None = None
    for part in parts:
        found = part if found is None else _merge(found, part)
    if found is None:
        raise ValueError("nothing to merge")
    return found


def spread_clustering(spread: Spread, prefactor: str = "c_over_n") -> float:
    """R_FC of a whole split. N is the mean number of images a class, mu the mean of all images."""
    images = int(spread.counts.sum())
    mean = (spread.means * spread.counts.unsqueeze(1)).sum(0) / images
    between = float((spread.means - mean).square().sum())
    classes = len(spread.ids)
    return _factor(prefactor, classes, images / classes) * float(spread.within.sum()) / max(between, LEAST)


def _merge(a: Spread, b: Spread) -> Spread:
    ids = torch.cat([a.ids, b.ids]).unique()
    counts = torch.zeros(2, len(ids), dtype=torch.int64)
    means, within = torch.zeros(2, len(ids), a.means.shape[1], dtype=torch.float64), torch.zeros(2, len(ids)).double()
    for side, part in enumerate((a, b)):
        place = torch.searchsorted(ids, part.ids)
        counts[side, place], means[side, place], within[side, place] = part.counts, part.means, part.within
    total, difference = counts.sum(0), means[1] - means[0]
    share = counts[1] / total.double()
    crossed = difference.square().sum(1) * counts[0] * share
    return Spread(ids, total, means[0] + share.unsqueeze(1) * difference, within.sum(0) + crossed)


def _factor(prefactor: str, classes: int, images: float) -> float:
    return {"c_over_n": classes / images, "one_over_n": 1 / images, "none": 1.0}[prefactor]


def _variances(features: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of the images to their class's mean, and of those to the mean of all, summed: each [...]."""
    means = features.mean(-2)
    within = (features - means.unsqueeze(-2)).square().sum((-3, -2, -1))
    return within, (means - means.mean(-2, keepdim=True)).square().sum((-2, -1))


def _differences(features: Tensor) -> tuple[Tensor, Tensor]:
    """How far apart the two differences of images of two classes are, and their lengths summed: each [...]."""
    first, second = (features.select(-3, 0) - features.select(-3, 1)).unbind(-2)
    return _norm(first - second), _norm(first) + _norm(second)


def _norm(x: Tensor) -> Tensor:
    return root(x.square().sum(-1))
