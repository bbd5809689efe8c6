"""P>M>F against modules and PyTorch's Adam, one task at a time."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import PipelineError
from pipeline.functional.views import drawn, recoloured
from pipeline.methods.pmf import PMF
from pipeline.nets.conv4 import Conv4
from tests.methods import toy
from tests.methods.test_rfs import by_hand


def build(**options) -> PMF:
    torch.manual_seed(1)
    method = PMF(Conv4((1, 6, 6), width=[4, 4]), **options).double().train()
    for _ in range(3):  # running averages that are not those of the support
        method.backbone(1 + 2 * torch.randn(20, 1, 6, 6, dtype=torch.float64))
    return method.eval()


def logits_of(backbone, support, labels, query, tau) -> torch.Tensor:
    features = backbone(support)
    means = torch.stack([features[labels == c].mean(0) for c in range(4)])
    return tau * F.normalize(backbone(query), dim=1) @ F.normalize(means, dim=1).T


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_tuned_by_modules(tasks):
    batch, steps = toy.awkward(), 5
    method = build(rates=[0.01], steps=steps, probability=0.5, tasks=tasks)
    with torch.inference_mode():
        logits = method.classify(method.adapt(batch.support, batch.support_labels, 4), batch.query)
    places, augmented = drawn(8, steps, 6).numpy(), drawn(1, steps, 1, seed=1).flatten() < 0.5
    assert 0 < augmented.sum() < steps
    for t in range(3):
        real = batch.support_labels[t] >= 0
        support, labels = batch.support[t][real], batch.support_labels[t][real]
        backbone = copy.deepcopy(method.backbone)
        optimizer = torch.optim.Adam(backbone.parameters(), lr=0.01)
        for step in range(steps):
            views = support
            if augmented[step]:
                place = places[step][real.numpy()]
                coloured = np.stack(
                    [coloured_by_hand(i, u) for i, u in zip(support.numpy(), place[:, 3:], strict=True)]
                )
                views = torch.as_tensor(by_hand(coloured, place[:, :3], 1).copy())
            optimizer.zero_grad()
            F.cross_entropy(logits_of(backbone, support, labels, views, 10), labels).backward()
            optimizer.step()
        with torch.no_grad():
            expected = logits_of(backbone, support, labels, batch.query[t], 10) - 10
        torch.testing.assert_close(logits[t].clone(), expected, rtol=0, atol=1e-5)


def coloured_by_hand(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    image = image + draws[0] - 0.5
    grey = image.mean(0)
    image = np.stack([grey + (channel - grey) * 2 * draws[1] for channel in image])
    return image.mean() + (image - image.mean()) * (draws[2] + 0.5)


def test_colours():
    images, draws = torch.randn(2, 7, 3, 4, 5, dtype=torch.float64), drawn(7, 1, 3)[0]
    found = recoloured(images, draws)
    for t in range(2):
        for image, draw, mine in zip(images[t], draws, found[t], strict=True):
            np.testing.assert_allclose(mine, coloured_by_hand(image.numpy(), draw.numpy()), atol=1e-12)


def test_rate_nought_is_a_prototypical_network_by_cosine():
    batch = toy.awkward()
    method = build()
    state = method.adapt(batch.support, batch.support_labels, 4)
    for t in range(3):
        real = batch.support_labels[t] >= 0
        expected = logits_of(method.backbone, batch.support[t][real], batch.support_labels[t][real], batch.query[t], 10)
        torch.testing.assert_close(method.classify(state, batch.query)[t], expected - 10, rtol=0, atol=1e-5)
    assert method.embeds_once and method.extendable, "as a prototypical network is evaluated"
    method.settle(0.001)
    assert not method.embeds_once and not method.extendable
    assert "prototypes" in state and set(method.adapt(batch.support, batch.support_labels, 4)) > set(state)
    assert set(method.train().adapt(batch.support, batch.support_labels, 4)) == set(state)


def test_frozen_weights_are_not_tuned():
    batch, method = toy.awkward(), build(rates=[0.01], steps=1)
    first = next(name for name, _ in method.backbone.named_parameters())
    method.backbone.get_parameter(first).requires_grad_(False)
    assert first not in method.adapt(batch.support, batch.support_labels, 4)
    method.backbone.requires_grad_(False)
    assert set(method.adapt(batch.support, batch.support_labels, 4)) == {"prototypes", "counts"}


@pytest.mark.parametrize("wrong", [{"rates": []}, {"rates": [-1.0]}, {"steps": 0}, {"probability": 2}])
def test_refusals(wrong):
    with pytest.raises(PipelineError, match=f"{next(iter(wrong))}="):
        build(**wrong)
