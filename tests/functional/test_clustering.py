"""Clustering measures against loops over images in float64, and against finite differences."""

from __future__ import annotations

import itertools

import pytest
import torch

from pipeline.functional.clustering import (
    PREFACTORS,
    class_spread,
    feature_clustering,
    hyperplane_variation,
    merge_spreads,
    official_feature_clustering,
    official_hyperplane_variation,
    spread_clustering,
)


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(groups: list[torch.Tensor], prefactor: str) -> float:
    """R_FC of classes with any number of images."""
    every = [f for group in groups for f in group]
    mean = sum(every) / len(every)
    within = between = 0.0
    for group in groups:
        centre = sum(group) / len(group)
        within += sum(float(((f - centre) ** 2).sum()) for f in group)
        between += float(((centre - mean) ** 2).sum())
    images = len(every) / len(groups)
    return {"c_over_n": len(groups) / images, "one_over_n": 1 / images, "none": 1.0}[prefactor] * within / between


@pytest.mark.parametrize("prefactor", PREFACTORS)
@pytest.mark.parametrize("shape", [(2, 2, 3), (5, 4, 7), (3, 9, 1)])
def test_feature_clustering(prefactor, shape):
    features = draw(6, *shape)
    found = feature_clustering(features, prefactor)
    assert found.tolist() == pytest.approx([by_definition(list(group), prefactor) for group in features])


def test_official_form_is_the_papers_of_a_pair():
    features = draw(8, 2, 2, 5)
    torch.testing.assert_close(official_feature_clustering(features), feature_clustering(features), rtol=1e-5, atol=0)


def test_hyperplane_variation():
    features = draw(6, 2, 2, 5)
    ratios = []
    for (x1, x2), (y1, y2) in features:
        ratios.append(float(((x1 - y1) - (x2 - y2)).norm() / ((x1 - y1).norm() + (x2 - y2).norm())))
    assert hyperplane_variation(features).tolist() == pytest.approx(ratios)
    squares = [4 * r * r for r in ratios]
    assert official_hyperplane_variation(features).tolist() == pytest.approx(squares, rel=1e-3)
    same = features[:, :, :1].expand(-1, -1, 2, -1)
    assert hyperplane_variation(same).abs().max() == 0


@pytest.mark.parametrize(
    "function",
    [feature_clustering, hyperplane_variation, official_feature_clustering, official_hyperplane_variation],
)
def test_gradients(function):
    features = draw(3, 2, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(function, features, eps=1e-6, atol=1e-7)
    for dead in (torch.zeros(1, 2, 2, 4), torch.ones(1, 2, 2, 4)):
        dead.requires_grad_()
        function(dead).sum().backward()
        assert dead.grad.isfinite().all()


@pytest.mark.parametrize("prefactor", PREFACTORS)
def test_a_split_in_pieces(prefactor):
    """Pieces cut anywhere, classes of unequal size in pieces far apart, and far from the origin."""
    sizes, offset = [3, 8, 1, 5], 1e4
    groups = [offset + draw(n, 6, seed=n) for n in sizes]
    features = torch.cat(groups)
    labels = torch.tensor([9, 2, 40, 7]).repeat_interleave(torch.tensor(sizes))
    expected = by_definition(groups, prefactor)
    for cuts in ([17], [4, 4, 4, 5], [1] * 17):
        parts = [class_spread(f, y) for f, y in zip(features.split(cuts), labels.split(cuts), strict=True)]
        for order in itertools.islice(itertools.permutations(parts), 3):
            merged = merge_spreads(order)
            assert merged.ids.tolist() == [2, 7, 9, 40] and merged.counts.tolist() == [8, 5, 3, 1]
            assert spread_clustering(merged, prefactor) == pytest.approx(expected, rel=1e-7)
