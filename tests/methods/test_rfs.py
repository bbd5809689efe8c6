"""RFS against scikit-learn's logistic regression, and its distillation by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pipeline.batch import Images
from pipeline.errors import PipelineError
from pipeline.functional.logistic import multinomial_weights
from pipeline.functional.views import drawn, shifted
from pipeline.methods.prototypical import Prototypical
from pipeline.methods.rfs import RFS
from pipeline.nets.mlp import MLP
from tests.methods.toy import awkward


def reference(x: np.ndarray, y: np.ndarray, cost: float) -> LogisticRegression:
    """Two classes have one vector there: half the penalty."""
    two = len(np.unique(y)) == 2
    return LogisticRegression(C=2 * cost if two else cost, solver="newton-cholesky", tol=1e-12).fit(x, y)


@pytest.mark.parametrize("cost", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("way", [2, 4])
def test_regression_by_scikit_learn(way, cost):
    generator = torch.Generator().manual_seed(way)
    features = torch.randn(3, 12, 7, generator=generator, dtype=torch.float64) * 2
    labels = torch.stack([torch.randperm(12, generator=generator) % (way + 1) - 1 for _ in range(3)])
    weights, biases = multinomial_weights(features, labels, way, cost)
    query = torch.randn(3, 20, 7, generator=generator, dtype=torch.float64)
    found = (query @ weights.mT + biases.unsqueeze(1)).softmax(-1)
    for t in range(3):
        real = labels[t] >= 0
        theirs = reference(features[t][real].numpy(), labels[t][real].numpy(), cost)
        np.testing.assert_allclose(found[t], theirs.predict_proba(query[t].numpy()), atol=1e-5)


def test_a_task_is_fitted_as_if_it_were_alone():
    batch = awkward()
    features = batch.support.flatten(2)
    weights, biases = multinomial_weights(features, batch.support_labels, 4, 1.0)
    for t in range(3):
        real = batch.support_labels[t] >= 0
        alone = multinomial_weights(features[t][real][None], batch.support_labels[t][real][None], 4, 1.0)
        torch.testing.assert_close(alone[0][0], weights[t], rtol=0, atol=1e-9)
        torch.testing.assert_close(alone[1][0], biases[t], rtol=0, atol=1e-9)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("copies", [0, 3])
def test_answers_by_hand(copies, normalise):
    batch = awkward()
    method = RFS(MLP((1, 6, 6)), 7, copies, crop_padding=2, normalise=normalise).double().eval()
    logits = method.classify(method.adapt(batch.support, batch.support_labels, 4), batch.query).detach()
    for t in range(3):
        real = batch.support_labels[t] >= 0
        x, y = batch.support[t][real].numpy(), batch.support_labels[t][real].numpy()
        if copies:
            draws = drawn(8, copies, 3).numpy()  # of all places in the support, padding too
            x, y = np.concatenate([by_hand(x, draw[real], 2) for draw in draws]), np.tile(y, copies)
        features, query = (method.backbone(torch.as_tensor(i)).detach().numpy() for i in (x, batch.query[t]))
        if normalise:
            features, query = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (features, query))
        theirs = reference(features, y, 1.0).predict_proba(query)
        np.testing.assert_allclose(logits[t].softmax(-1), theirs, atol=1e-5)


def by_hand(images: np.ndarray, draws: np.ndarray, padding: int) -> np.ndarray:
    out = []
    for image, (down, right, mirrored) in zip(images, draws, strict=True):
        top, left = (int(u * (2 * padding + 1)) for u in (down, right))
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        cut = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
        out.append(cut if mirrored < 0.5 else cut[:, :, ::-1])
    return np.stack(out)


def test_views():
    images = torch.arange(2 * 30 * 5 * 4, dtype=torch.float64).view(1, 30, 2, 5, 4)
    draws = drawn(30, 4, 3)
    views = torch.cat([shifted(images, draw, 2)[0] for draw in draws])
    np.testing.assert_array_equal(views, np.concatenate([by_hand(images[0].numpy(), d, 2) for d in draws.numpy()]))
    assert torch.equal(drawn(7, 4, 3), draws[:, :7])


def test_distillation_by_hand():
    torch.manual_seed(0)
    method, teacher = (RFS(MLP((1, 6, 6)), 7, alpha=0.3, beta=0.8, temperature=3.0).double() for _ in range(2))
    images, labels = torch.randn(9, 1, 6, 6, dtype=torch.float64), torch.arange(9) % 7
    plain = method(Images(images, labels))[0]
    names = set(method.state_dict())
    method.imitate(teacher.eval())
    loss, figures = method(Images(images, labels))
    loss.backward()
    logits, taught = (m.classifier(m.backbone(images)).detach().numpy() for m in (method, teacher))
    p, q = (np.exp(x / 3) / np.exp(x / 3).sum(1, keepdims=True) for x in (taught, logits))
    apart = 9 * (p * np.log(p / q)).sum(1).mean()
    assert figures["divergence"].item() == pytest.approx(apart, abs=1e-12)
    assert loss.item() == pytest.approx(0.3 * plain.item() + 0.8 * apart, abs=1e-12)
    assert set(method.state_dict()) == names and all(p.grad is None for p in teacher.parameters())


def test_refusals():
    with pytest.raises(PipelineError, match="cost=0"):
        RFS(MLP((1, 6, 6)), 7, cost=0)
    with pytest.raises(PipelineError, match="method.copies=0"):
        RFS(MLP((1, 4, 4)), 7).adapt(torch.zeros(1, 2, 1, 4, 4), torch.tensor([[0, 1]]))
    with pytest.raises(PipelineError, match="no answers over the training classes"):
        RFS(MLP((1, 6, 6)), 7).imitate(Prototypical(MLP((1, 6, 6))))
