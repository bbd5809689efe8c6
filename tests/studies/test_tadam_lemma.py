"""Lemma 1 of TADAM in float64: what is left of the gradient, divided by alpha, for very small and very large alpha."""

from __future__ import annotations

import io
from math import inf

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from docs.studies.lemma import ALPHAS, Approach, approach, class_losses, example, lemma_plot, scaled_gradients
from pipeline.functional.prototypes import prototypes
from pipeline.methods.tadam import METRICS
from pipeline.nets.conv4 import Conv4


def derivatives(distances, phi):
    """d'_j of every query and prototype, one at a time: [Q, W, *phi.shape]."""
    each = [[torch.autograd.grad(d, phi, retain_graph=True)[0] for d in row] for row in distances]
    return torch.stack([torch.stack(row) for row in each])


@pytest.mark.parametrize("metric", METRICS)
def test_limits_by_the_lemma(metric):
    """With C the number of classes, whatever the number of shots."""
    distances, labels, phi = example(metric)
    d, way = derivatives(distances, phi), distances.shape[1]
    low, high = torch.zeros(2, way, *phi.shape, dtype=torch.float64)
    for x, k in enumerate(labels.tolist()):
        others = [j for j in range(way) if j != k]
        low[k] += (way - 1) / way * d[x, k] - sum(d[x, j] for j in others) / way
        high[k] += d[x, k] - d[x, int(distances[x].argmin())]
    torch.testing.assert_close(scaled_gradients(distances, labels, 0.0, phi), low, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scaled_gradients(distances, labels, inf, phi), high, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(low, high, atol=0.1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0, 7.5, 100.0])
def test_gradient_of_the_summed_loss_divided_by_alpha(metric, alpha):
    distances, labels, phi = example(metric)
    losses = class_losses(distances, labels, alpha)
    expected = [torch.autograd.grad(j, phi, retain_graph=True)[0] / alpha for j in losses]
    found = scaled_gradients(distances, labels, alpha, phi)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("metric", METRICS)
def test_the_loss_itself_approaches_both_limits(metric):
    """Linearly in alpha below, and faster than any power above."""
    distances, labels, phi = example(metric)

    def distance(alpha: float, limit: float) -> float:
        gradient = torch.autograd.grad(class_losses(distances, labels, alpha).sum(), phi, retain_graph=True)[0] / alpha
        aim = scaled_gradients(distances, labels, limit, phi).sum(0)
        return float((gradient - aim).norm() / aim.norm())

    below = [distance(alpha, 0.0) for alpha in (1e-3, 1e-4, 1e-5)]
    assert below[0] / below[1] == pytest.approx(10, rel=0.05) and below[1] / below[2] == pytest.approx(10, rel=0.05)
    assert below[2] < 1e-3
    assert distance(1e4, inf) < 1e-9 < 0.3 < distance(1e-3, inf)
    assert distance(1e4, 0.0) > 0.3


def test_for_large_alpha_only_mistakes_count():
    distances, labels, phi = example()
    right = distances.argmin(1) == labels
    assert 0.2 < right.double().mean() < 0.95
    kept = labels.masked_fill(right, -1)
    for alpha in (inf, 1e4):
        everything = scaled_gradients(distances, labels, alpha, phi)
        torch.testing.assert_close(everything, scaled_gradients(distances, kept, alpha, phi), rtol=1e-9, atol=1e-9)
        alone = scaled_gradients(distances, labels.masked_fill(~right, -1), alpha, phi)
        assert alone.abs().max() < 1e-9 * everything.abs().max()


def test_through_a_network():
    torch.manual_seed(0)
    net = Conv4((1, 8, 8), width=[3, 4]).double().eval()
    phi = net.convs[0].weight
    labels = torch.arange(3).repeat(4)
    means, _ = prototypes(net(torch.randn(6, 1, 8, 8, dtype=torch.float64))[None], torch.arange(3).repeat(2)[None], 3)
    distances = METRICS["euclidean"](net(torch.randn(12, 1, 8, 8, dtype=torch.float64)), means[0])
    measured = approach(distances, labels, phi, [1e-4, 1e5])
    assert measured.distance[0, 0] < 1e-3 and measured.distance[1, 1] < 1e-6
    assert measured.angle[0, 0] < 1e-6 and measured.angle[1, 1] < 1e-9
    assert measured.distance[0, 1] > 0.1 and measured.distance[1, 0] > 0.1


@pytest.mark.parametrize("metric", METRICS)
def test_measured_over_the_scale(metric):
    measured = approach(*example(metric), ALPHAS)
    assert measured.distance.shape == measured.angle.shape == (2, len(ALPHAS))
    assert (ALPHAS[[0, -1]] == [1e-3, 1e3]).all()
    assert measured.distance[0, 0] < 0.03 and measured.distance[1, -1] < 1e-6
    assert measured.angle[0, 0] < 1e-3 and measured.angle[1, -1] < 1e-9
    assert np.isfinite(measured.distance).all() and (measured.angle > -1e-9).all()
    assert (np.diff(measured.distance[0, :20]) > 0).all()


def test_plot_shows_what_was_measured(monkeypatch):
    drawn: list = []
    original = Axes.plot

    def plot(self, x, y, **options):
        drawn.append((np.asarray(x), np.asarray(y)))
        return original(self, x, y, **options)

    monkeypatch.setattr(Axes, "plot", plot)
    measured = Approach(np.asarray([0.1, 1.0, 10.0]), np.asarray([[0.1, 0.5, 1], [1, 0.4, 0]]), np.full((2, 3), 0.2))
    png = lemma_plot(measured)
    assert [y.tolist() for _, y in drawn] == [[0.1, 0.5, 1], [1, 0.4, 1e-8], [0.2] * 3, [0.2] * 3]
    with Image.open(io.BytesIO(png)) as image:
        assert np.asarray(image.convert("L")).std() > 5
    assert png == lemma_plot(measured) and b"<svg" in lemma_plot(measured, kind="svg")
