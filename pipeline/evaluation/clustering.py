"""How clustered the features of a trained backbone are, over a whole split (Goldblum et al. 2020, tables 2 and 3).

R_FC is of all images of the split, R_HV a mean over sampled pairs of classes with two images each. Images go through
the network in random order, a chunk at a time, so that memory is bounded by the number of classes and a backbone that
normalises by its batch sees images of all classes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.batch import Images
from pipeline.data.batches import read_batch
from pipeline.data.dataset import Dataset, check_shards, class_table, open_dataset, read_manifest
from pipeline.data.episodes import EpisodeSpec, ImagePlan, check_spec, plan_groups, plan_images
from pipeline.evaluation.model import Built, Model
from pipeline.evaluation.spread import OnCluster, cores, fetched, parts
from pipeline.evaluation.statistics import Comparison, Estimate, estimate, paired
from pipeline.functional.clustering import (
    PREFACTORS,
    Spread,
    class_spread,
    hyperplane_variation,
    merge_spreads,
    spread_clustering,
)
from pipeline.nets.pieces import in_pieces

CHUNK = 500  # images at once
RESAMPLES = 1000  # of the classes, for the interval of R_FC


@dataclass(frozen=True)
class ClusteringProtocol:
    """What to measure: a split, the number of sampled pairs of classes, and the seed of order, pairs and resamples."""

    dataset: str
    split: str
    pairs: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class ClusteringResult:
    """What was found in the features of a model."""

    protocol: ClusteringProtocol
    spread: Spread = field(repr=False)
    variations: np.ndarray = field(repr=False)  # R_HV of every sampled pair [pairs] float64

    @property
    def feature_clustering(self) -> Estimate:
        """R_FC with the paper's prefactor, its interval by drawing classes anew."""
        values = resampled(self.spread, self.protocol.seed)
        return Estimate(spread_clustering(self.spread), 1.96 * float(values.std(ddof=1)), len(self.spread.ids))

    @property
    def hyperplane_variation(self) -> Estimate:
        return estimate(self.variations)

    def summary(self) -> dict[str, Any]:
        clustering, variation = self.feature_clustering, self.hyperplane_variation
        protocol = self.protocol
        return {
            **{"split": protocol.split, "pairs": protocol.pairs, "seed": protocol.seed},
            "classes": len(self.spread.ids),
            "images": int(self.spread.counts.sum()),
            "features": self.spread.means.shape[1],
            "feature_clustering": {"value": clustering.mean, "interval": clustering.interval},
            "feature_clustering_by_prefactor": {p: spread_clustering(self.spread, p) for p in PREFACTORS},
            "hyperplane_variation": {"value": variation.mean, "interval": variation.interval},
        }


def measure_clustering(model: Model, protocol: ClusteringProtocol, gpus: float = 0.0) -> ClusteringResult:
    """Both measures, spread over the cluster."""
    check_shards(protocol.dataset)
    table = class_table(read_manifest(protocol.dataset), protocol.split)
    check_spec(table, EpisodeSpec(2, 1, 1), "clustering")
    total, places = int(table.counts.sum()), 2 * cores()
    cluster = OnCluster(model, gpus)
    images = parts(total, max(2 * CHUNK, -(-total // places)))
    pairs = parts(protocol.pairs, max(CHUNK // 4, -(-protocol.pairs // places)))
    spreads, variations = cluster.spread(spread_of, images, protocol), cluster.spread(variations_of, pairs, protocol)
    return ClusteringResult(protocol, merge_spreads(fetched(spreads)), np.concatenate(fetched(variations)))


def compare(meta: ClusteringResult, classical: ClusteringResult) -> dict[str, Comparison]:
    """Meta-trained minus classically trained, by the same classes and the same pairs."""
    a, b = (resampled(result.spread, result.protocol.seed) for result in (classical, meta))
    difference = spread_clustering(meta.spread) - spread_clustering(classical.spread)
    half = 1.96 * float((b - a).std(ddof=1))
    classes = len(meta.spread.ids)
    return {
        "feature_clustering": Comparison(difference, difference - half, difference + half, 0.95, classes),
        "hyperplane_variation": paired(classical.variations, meta.variations),
    }


def resampled(spread: Spread, seed: int) -> np.ndarray:
    """R_FC of as many classes drawn with replacement, [RESAMPLES]; equal seeds draw equal classes."""
    rng, classes = np.random.default_rng(seed), len(spread.ids)
    draws = (torch.from_numpy(rng.integers(classes, size=classes)) for _ in range(RESAMPLES))
    return np.asarray([spread_clustering(Spread(*(part[draw] for part in spread))) for draw in draws])


def spread_of(built: Built, numbers: range, protocol: ClusteringProtocol) -> Spread:
    """The spread of the images ``numbers``, a range in a random order of the split."""
    return merge_spreads(
        class_spread(features, torch.from_numpy(plan.labels))
        for plan, features in _seen(built, numbers, CHUNK, protocol, plan_images)
    )


def variations_of(built: Built, numbers: range, protocol: ClusteringProtocol) -> np.ndarray:
    """R_HV [n] of the sampled pairs ``numbers``, a range."""
    plan_pairs = partial(plan_groups, classes=2, images=2)
    found = _seen(built, numbers, CHUNK // 4, protocol, plan_pairs)
    return np.concatenate([hyperplane_variation(f.view(-1, 2, 2, f.shape[-1]).double()).numpy() for _, f in found])


def _seen(
    built: Built, numbers: range, chunk: int, protocol: ClusteringProtocol, plan_of: Callable[..., ImagePlan]
) -> Iterator[tuple[ImagePlan, Tensor]]:
    """Plans of ``chunk`` of the ``numbers`` each, and the features of their images."""
    dataset = open_dataset(protocol.dataset)
    table = class_table(dataset.manifest, protocol.split)
    for first in range(numbers.start, numbers.stop, chunk):
        plan = plan_of(table, protocol.seed, np.arange(first, min(first + chunk, numbers.stop)))
        yield plan, image_features(built, dataset, plan)


@torch.no_grad()
def image_features(built: Built, dataset: Dataset, plan: ImagePlan) -> Tensor:
    """Features float32 [B, D] of the images of a plan by the backbone alone, whatever trained it, on the CPU."""
    batch = read_batch(dataset, plan, built.device)
    assert isinstance(batch, Images)
    return in_pieces(built.method.extractor(), built.preprocess(batch.images)).float().cpu()
