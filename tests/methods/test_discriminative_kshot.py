from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import nn

from pipeline.batch import Images
from pipeline.errors import PipelineError
from pipeline.methods.discriminative_kshot import DiscriminativeKShot
from pipeline.nets.conv4 import Conv4
from tests.methods import toy


def build(**options) -> DiscriminativeKShot:
    torch.manual_seed(1)
    method = DiscriminativeKShot(Conv4((1, 6, 6), width=[3, 4]), classes=12, **options).double()
    with torch.no_grad():
        method.head.weight.mul_(torch.tensor([1.0, 3.0, 0.5, 2.0])).add_(0.3)
    return method.eval()


def covariance(method: DiscriminativeKShot, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the training classes' weights with their biases, written out."""
    weights = torch.cat([method.head.weight, method.head.bias[:, None]], 1).detach().numpy()
    mean = weights.mean(0)
    outer = (weights - mean).T @ (weights - mean)
    isotropic = np.trace(outer) / weights.size * np.eye(5)
    full = (64 * isotropic + outer) / (64 + 12)
    return mean, {"isotropic": isotropic, "full": full, "diagonal": np.diag(np.diag(full))}[kind]


@pytest.mark.parametrize("prior", ["isotropic", "diagonal", "full"])
def test_weights_are_the_posteriors_mode(prior):
    """Against a general solver over the weights, task by task: unequal shots, padding among support and queries."""
    method, batch = build(prior=prior, prior_scale=20.0), toy.awkward()
    mean, sigma = covariance(method, prior)
    precision = np.linalg.inv(20.0 * sigma)
    state = method.adapt(batch.support, batch.support_labels)
    logits = method.classify(state, batch.query)
    for t in range(3):
        keep = batch.support_labels[t] >= 0
        with torch.no_grad():
            x = np.pad(method.backbone(batch.support[t][keep]).numpy(), ((0, 0), (0, 1)), constant_values=1)
            q = np.pad(method.backbone(batch.query[t]).numpy(), ((0, 0), (0, 1)), constant_values=1)
        y = batch.support_labels[t][keep].numpy()

        def negative_log(w, x=x, y=y):
            w = w.reshape(4, 5)
            logs = log_softmax(x @ w.T, axis=1)
            value = 0.5 * np.einsum("ki,ij,kj", w - mean, precision, w - mean) - logs[np.arange(len(y)), y].sum()
            return value, ((np.exp(logs) - np.eye(4)[y]).T @ x + (w - mean) @ precision).ravel()

        expected = minimize(negative_log, np.zeros(20), jac=True, method="BFGS", options={"gtol": 1e-9}).x
        np.testing.assert_allclose(state["weights"][t].numpy().ravel(), expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(logits[t].detach().numpy(), q @ expected.reshape(4, 5).T, rtol=0, atol=1e-5)
        assert np.abs(negative_log(state["weights"][t].numpy().ravel())[1]).max() < 1e-9


def test_laplace_averages_over_the_curvature_at_the_mode():
    method, batch = build(prior_scale=20.0, inference="laplace", samples=40000), toy.awkward()
    mean, sigma = covariance(method, "isotropic")
    state = method.adapt(batch.support, batch.support_labels)
    found = method.classify(state, batch.query).detach()
    plain = build(prior_scale=20.0)
    torch.testing.assert_close(state["weights"], plain.adapt(batch.support, batch.support_labels)["weights"])
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3, 6).double())
    one = torch.nn.functional.pad
    for t in range(3):
        keep = batch.support_labels[t] >= 0
        with torch.no_grad():
            x = one(method.backbone(batch.support[t][keep]), (0, 1), value=1.0)
            q = one(method.backbone(batch.query[t]), (0, 1), value=1.0)

        def negative_log(w, x=x, y=batch.support_labels[t][keep]):
            away = w.view(4, 5) - torch.tensor(mean)
            logs = (x @ w.view(4, 5).mT).log_softmax(-1)
            return 0.5 * away.square().sum() / (20.0 * sigma[0, 0]) - logs[torch.arange(len(y)), y].sum()

        mode = state["weights"][t].flatten()
        spread = torch.linalg.inv(torch.autograd.functional.hessian(negative_log, mode))
        drawn = np.random.default_rng(0).multivariate_normal(mode.numpy(), spread.numpy(), 40000).reshape(-1, 4, 5)
        expected = torch.tensor(np.einsum("ski,qi->sqk", drawn, q.numpy())).softmax(-1).mean(0)
        torch.testing.assert_close(found[t].exp(), expected, rtol=0, atol=0.01)
    sharp = plain.classify(plain.adapt(batch.support, batch.support_labels), batch.query).log_softmax(-1)
    assert (found.exp().amax(-1).mean() < sharp.exp().amax(-1).mean()).item()  # it is less certain


@pytest.mark.parametrize("inference", ["map", "laplace"])
def test_a_task_is_answered_alone_as_among_others(inference):
    method, batch = build(inference=inference, prior_scale=5.0), toy.awkward()
    with torch.inference_mode():
        state = method.adapt(batch.support, batch.support_labels, 4)
        logits = method.classify(state, batch.query)
        assert torch.equal(logits, method.classify(state, batch.query))
        for t in range(3):
            alone, _, kept = toy.one(batch, t)
            found = method.classify(method.adapt(alone.support, alone.support_labels, 4), alone.query)
            torch.testing.assert_close(found[0], logits[t][kept], rtol=0, atol=1e-10)
    assert all(len(v) == 3 for v in state.values())
    assert method.extend(state, batch.support, batch.support_labels) is None


def test_training_is_a_softmax_over_the_training_classes():
    method = build().train()
    x, labels = torch.randn(6, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 3, 11, 3, 5, -1])
    loss, metrics = method(Images(x, labels))
    loss.backward()
    again = build().train()
    logits = again.backbone(x) @ again.head.weight.mT + again.head.bias
    expected = -logits.log_softmax(-1)[torch.arange(5), labels[:5]].mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert all(p.grad is not None for p in method.parameters()) and 0 <= float(metrics["accuracy"]) <= 1


class Linear(nn.Sequential):
    out_features = 16

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(36, 16))


@pytest.mark.parametrize("options", [{}, {"prior": "full", "inference": "laplace"}], ids=str)
def test_learns(options):
    torch.manual_seed(0)
    method = DiscriminativeKShot(Linear(), classes=toy.CLASSES, **options)
    before = toy.accuracy(method)
    toy.train(method, steps=150, lr=1e-2)
    assert toy.accuracy(method) > before + 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "student"}, "choose one of isotropic, diagonal, full"),
        ({"inference": "hmc"}, "choose one of map, laplace"),
        ({"prior_scale": 0.0}, "prior_scale=0.0 and samples=128 must be above zero"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(PipelineError, match=message):
        build(**options)
