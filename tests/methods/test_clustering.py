from __future__ import annotations

import pytest
import torch

from pipeline.batch import Images
from pipeline.errors import PipelineError
from pipeline.functional.clustering import feature_clustering, hyperplane_variation
from pipeline.methods.clustering import Clustering
from pipeline.nets.mlp import MLP

CLASSES, WAY = 8, 3


def build(**options) -> Clustering:
    torch.manual_seed(1)
    return Clustering(MLP((1, 4, 4), widths=[12]), CLASSES, **options)


def batch(groups=6, classes=2, images=2) -> Images:
    """Noisy images of ``CLASSES`` directions, in groups."""
    means = 2 * torch.randn(CLASSES, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    chosen = torch.stack([torch.randperm(CLASSES)[:classes] for _ in range(groups)])
    labels = chosen.repeat_interleave(images, dim=1).flatten()
    return Images(means[labels] + torch.randn(len(labels), 1, 4, 4), labels)


def train(method, steps=80) -> None:
    torch.manual_seed(4)
    optimizer = torch.optim.Adam(method.parameters(), 1e-2)
    for _ in range(steps):
        loss, _ = method(batch(16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("prefactor", ["c_over_n", "none"])
@pytest.mark.parametrize("form", ["paper", "official"])
def test_gradient_is_the_central_finite_difference(form, prefactor):
    method = build(form=form, prefactor=prefactor, feature_clustering=0.3, hyperplane_variation=0.7).double()
    given = batch()
    given = Images(given.images.double(), given.labels)
    method(given)[0].backward()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in method.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += step * direction
                losses.append(method(given)[0].item())
                parameter -= step * direction
        difference = (losses[0] - losses[1]) / 2e-6
        assert (parameter.grad * direction).sum().item() == pytest.approx(difference, rel=1e-5, abs=1e-8), name


def test_larger_groups():
    method, given = build(group=[4, 3]), batch(5, 4, 3)
    loss, figures = method(given)
    features = method.backbone(given.images)
    expected = feature_clustering(features.view(5, 4, 3, 12)).mean()
    torch.testing.assert_close(figures["feature_clustering"], expected.detach())
    logits = method.classifier(features)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, given.labels) + expected)


def test_penalties_do_what_they_say():
    torch.manual_seed(9)
    fresh = batch(200)
    found = {}
    for name, options in {
        "none": {"feature_clustering": 0.0},
        "features": {},
        "hyperplanes": {"feature_clustering": 0.0, "hyperplane_variation": 1.0},
    }.items():
        method = build(**options)
        train(method)
        with torch.no_grad():
            logits = method.classifier(method.backbone(fresh.images))
            groups = method.backbone(fresh.images).view(-1, 2, 2, 12)
        assert (logits.argmax(-1) == fresh.labels).float().mean() > 0.95, name
        found[name] = feature_clustering(groups).mean().item(), hyperplane_variation(groups).mean().item()
    assert found["features"][0] < 0.8 * found["none"][0]
    assert found["hyperplanes"][1] < 0.9 * found["none"][1]


@pytest.mark.parametrize("head", ["svm", "ridge", "prototype", "nearest", "linear", "cosine"])
def test_new_classes(head):
    method = build(head=head)
    train(method)
    torch.manual_seed(5)
    labels = torch.arange(WAY).repeat(2, 12)
    means = 2 * torch.randn(2, WAY, 1, 4, 4)
    images = means[torch.arange(2)[:, None], labels] + 0.5 * torch.randn(2, 12 * WAY, 1, 4, 4)
    method.eval()
    with torch.inference_mode():
        answers = method.classify(method.adapt(images[:, : 2 * WAY], labels[:, : 2 * WAY]), images).argmax(-1)
    assert method.embeds_once and (answers == labels).float().mean() > 0.9


@pytest.mark.parametrize(
    "labels",
    [torch.arange(8), torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([3, 3, 3, 3]), torch.tensor([0, 1, 0, 1])],
)
def test_batches_that_are_not_in_groups(labels):
    with pytest.raises(PipelineError, match=r"set train.grouping=\[2,2\]"):
        build()(Images(torch.randn(len(labels), 1, 4, 4), labels))


def test_without_penalty_any_batch_is_as_good():
    method = build(feature_clustering=0.0)
    given = Images(torch.randn(7, 1, 4, 4), torch.arange(7))
    loss, figures = method(given)
    logits = method.classifier(method.backbone(given.images))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, given.labels))
    assert set(figures) == {"accuracy"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "code"}, "choose one of paper, official"),
        ({"prefactor": "n"}, "choose one of c_over_n"),
        ({"group": [2]}, "must be \\[classes, images\\]"),
        ({"group": [4, 2], "hyperplane_variation": 1.0}, "need \\[2, 2\\]"),
        ({"group": [4, 2], "form": "official"}, "need \\[2, 2\\]"),
        ({"head": "tree"}, "choose one of svm, ridge, prototype"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(PipelineError, match=message):
        build(**options)
