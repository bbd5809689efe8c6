"""Clustering of a split against all of its features at once, on any trained backbone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.data.batches import class_turns
from pipeline.data.dataset import Dataset, class_table
from pipeline.evaluation import clustering as module
from pipeline.evaluation.clustering import (
    ClusteringProtocol,
    ClusteringResult,
    compare,
    measure_clustering,
    resampled,
    spread_of,
    variations_of,
)
from pipeline.evaluation.model import Model, build_on_worker, kind, matched
from pipeline.functional.clustering import class_spread, feature_clustering, merge_spreads
from pipeline.model import build_model

from .test_episodic import spec


def model(method: str = "prototypical", seed: int = 5, **options) -> Model:
    torch.manual_seed(seed)
    described = spec(method, **options)
    return Model(described, dict(build_model(described).state_dict()), f"{method}{seed}")


@pytest.fixture(scope="module")
def features(glyphs) -> torch.Tensor:
    """Of the test split by model(), [40, 20, D]."""
    dataset = Dataset(glyphs)
    table = class_table(dataset.manifest, "test")
    rows = np.concatenate([np.arange(s, s + n) for s, n in zip(table.starts, table.counts, strict=True)])
    method, preprocess, _ = build_on_worker(model())
    with torch.no_grad():
        found = method.extractor()(preprocess(torch.from_numpy(dataset.gather(rows))))
    return found.double().view(40, 20, -1)


def test_a_split_in_chunks_is_the_split_at_once(glyphs, features, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 70)
    protocol = ClusteringProtocol(glyphs, "test", seed=3)
    built = build_on_worker(model())
    halves = [spread_of(built, part, protocol) for part in (range(333), range(333, 800))]
    result = ClusteringResult(protocol, merge_spreads(halves), np.zeros(2))
    assert result.spread.counts.tolist() == [20] * 40
    summary = result.summary()
    assert summary["feature_clustering"]["value"] == pytest.approx(float(feature_clustering(features)), rel=1e-4)
    assert summary["feature_clustering_by_prefactor"]["one_over_n"] == pytest.approx(
        float(feature_clustering(features, "one_over_n")), rel=1e-4
    )
    assert (summary["classes"], summary["images"], summary["features"]) == (40, 800, features.shape[-1])


def test_sampled_pairs_estimate_the_mean_of_all(glyphs, features):
    protocol = ClusteringProtocol(glyphs, "test", pairs=1500, seed=1)
    built = build_on_worker(model())
    found = variations_of(built, range(1500), protocol)
    rng, expected = np.random.default_rng(0), []
    for _ in range(4000):
        a, b = rng.choice(40, 2, replace=False)
        (x1, x2), (y1, y2) = (features[c, rng.choice(20, 2, replace=False)] for c in (a, b))
        expected.append(float(((x1 - y1) - (x2 - y2)).norm() / ((x1 - y1).norm() + (x2 - y2).norm())))
    spread_of = class_spread(features.flatten(0, 1), torch.arange(40).repeat_interleave(20))
    result = ClusteringResult(protocol, spread_of, found)
    estimate = result.hyperplane_variation
    spread = 1.96 * np.std(expected) / len(expected) ** 0.5
    assert abs(estimate.mean - np.mean(expected)) < 2 * (estimate.interval + spread)
    np.testing.assert_allclose(variations_of(built, range(700, 900), protocol), found[700:900], rtol=1e-5)
    other = variations_of(built, range(200), replace(protocol, seed=2))
    assert abs(other - found[:200]).max() > 0.1


def test_rotated_classes_are_turned(glyphs, monkeypatch):
    dataset = Dataset(glyphs)
    manifest = replace(dataset.manifest, rotations=[0, 90])
    dataset.manifest = manifest
    monkeypatch.setattr(module, "open_dataset", lambda uri: dataset)
    table = class_table(manifest, "val")
    protocol = ClusteringProtocol(glyphs, "val")
    found = spread_of(build_on_worker(model()), range(int(table.counts.sum())), protocol)
    assert found.counts.tolist() == [20] * 80
    method, preprocess, _ = build_on_worker(model())
    pixels = torch.from_numpy(dataset.gather(np.arange(table.starts[1], table.starts[1] + 20)))
    assert int(class_turns(table.ids[1:2], manifest.rotations)) == 1
    with torch.no_grad():
        turned = method.extractor()(preprocess(torch.rot90(pixels, 1, (2, 3)))).double()
    torch.testing.assert_close(found.means[1], turned.mean(0), rtol=1e-4, atol=1e-5)


def test_intervals_by_classes_drawn_anew(features):
    """Half as many classes, about sqrt(2) times the interval; and a real difference is found by pairs."""
    labels = torch.arange(40).repeat_interleave(20)
    protocol = ClusteringProtocol("", "test")
    whole = class_spread(features.flatten(0, 1), labels)
    half = class_spread(features[:20].flatten(0, 1), labels[:400])
    rates = [resampled(spread, 0).std() / resampled(spread, 0).mean() for spread in (whole, half)]
    assert 1.0 < rates[1] / rates[0] < 2.2
    means = features.mean(1, keepdim=True)
    tighter = class_spread((means + 0.9 * (features - means)).flatten(0, 1), labels)
    a = ClusteringResult(protocol, whole, np.linspace(1, 2, 50))
    b = ClusteringResult(protocol, tighter, np.linspace(1, 2, 50) - 0.1 - 0.01 * np.arange(50) % 3)
    found = compare(b, a)
    assert found["feature_clustering"].high < 0 and found["hyperplane_variation"].high < 0
    assert found["feature_clustering"].difference == pytest.approx(-0.19 * a.feature_clustering.mean, rel=1e-6)
    same = compare(a, a)["feature_clustering"]
    assert same.low == same.high == 0


def test_pairs_that_share_a_network():
    models = [model("prototypical"), model("baseline"), model("clustering"), model("maml")]
    models.append(Model({**spec("baseline"), "backbone": {"name": "conv4", "width": 16}}, None, "wider"))
    assert [kind(m) for m in models] == ["meta", "classical", "classical", "meta", "classical"]
    found = [(meta.label, classical.label) for meta, classical in matched(models)]
    assert found == [(m, c) for m in ("prototypical5", "maml5") for c in ("baseline5", "clustering5")]


def test_on_the_cluster(ray_session, glyphs, features):
    protocol = ClusteringProtocol(glyphs, "test", pairs=300, seed=1)
    result = measure_clustering(model(), protocol)
    assert result.feature_clustering.mean == pytest.approx(float(feature_clustering(features)), rel=1e-4)
    alone = variations_of(build_on_worker(model()), range(300), protocol)
    np.testing.assert_allclose(result.variations, alone, rtol=1e-5)
    assert 0 < measure_clustering(model("maml"), protocol).hyperplane_variation.mean < 1
