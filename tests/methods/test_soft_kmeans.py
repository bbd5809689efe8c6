from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.methods.soft_kmeans import SoftKMeans
from pipeline.nets.mlp import MLP
from tests.methods import toy


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("training", [True, False])
def test_image_by_image(steps, training):
    batch = toy.awkward()
    method = SoftKMeans(MLP((1, 6, 6)), scale=0.0625, joint_forward=False, steps=steps).double().train(training)
    logits = method.classify(method.adapt(batch.support, batch.support_labels, 4), batch.query).detach()
    for t, labels in enumerate(batch.support_labels.numpy()):
        x, q = (method.backbone(images[t]).detach().numpy() for images in (batch.support, batch.query))
        means = np.stack([x[labels == c].mean(0) for c in range(4)])
        for _ in range(steps):
            shares = [np.exp([-0.0625 * ((image - mean) ** 2).sum() for mean in means]) for image in q]
            shares = [share / share.sum() for share in shares]
            means = np.stack([
                (x[labels == c].sum(0) + sum(s[c] * image for s, image in zip(shares, q, strict=True)))
                / ((labels == c).sum() + sum(s[c] for s in shares))
                for c in range(4)
            ])  # fmt: skip
        np.testing.assert_allclose(logits[t], -0.0625 * ((q[:, None] - means) ** 2).sum(-1), rtol=0, atol=1e-10)


def test_gradients_reach_the_backbone_through_the_shares():
    batch = toy.awkward()
    method = SoftKMeans(MLP((1, 6, 6), widths=[5]), learn_scale=True, scale=0.1, steps=2).double()
    parameters = list(method.parameters())
    loss, _ = method(batch)
    found = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, found, strict=True):
        flat, index = parameter.data.view(-1), parameter.numel() // 2
        was, sides = flat[index].item(), []
        for step in (1e-6, -1e-6):
            flat[index] = was + step
            sides.append(method(batch)[0].item())
        flat[index] = was
        assert gradient.reshape(-1)[index].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4, abs=1e-8)


def test_refinement_helps_where_classes_are_clouds():
    """More queries tell where the centre of a class is than its one support image."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(200, 5, 30, generator=generator)
    labels = torch.arange(5).repeat(15).expand(200, -1)
    support = centres + 0.9 * torch.randn(200, 5, 30, generator=generator)
    query = centres.gather(1, labels[..., None].expand(-1, -1, 30))
    query = query + 0.9 * torch.randn(query.shape, generator=generator)
    right = {}
    for steps in (0, 5):
        method = SoftKMeans(MLP((1, 6, 6)), scale=0.3, steps=steps).eval()
        state = method.fit(support, torch.arange(5).expand(200, -1), 5)
        right[steps] = (method.scores(state, query).argmax(-1) == labels).double().mean().item()
    assert right[5] > right[0] + 0.02


def test_refusal():
    with pytest.raises(PipelineError, match="steps=-1"):
        SoftKMeans(MLP((1, 6, 6)), steps=-1)
