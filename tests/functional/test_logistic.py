from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp

from pipeline.functional.logistic import (
    TOLERANCE,
    expected_log_probabilities,
    fit_softmax,
    irls_weights,
    score_covariance,
)
from pipeline.methods.discriminative_kshot import PRIORS

LABELS = torch.tensor([[2, 0, 1, 1, 0, 1, 2], [1, 2, 0, 0, 0, -1, -1]])


def features(width: int) -> torch.Tensor:
    return torch.randn(2, 7, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("penalty", [1.0, 50.0])
@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_irls_is_newtons_method(penalty, iterations):
    """On the weights themselves, of the logistic loss and penalty / 2 times their squared length."""
    x = features(5)
    weights, biases = irls_weights(x, LABELS, 3, penalty, iterations)
    for t in range(2):
        rows = x[t][LABELS[t] >= 0]
        rows = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
        for k in range(3):
            y, w = (LABELS[t][LABELS[t] >= 0] == k).double(), torch.zeros(6).double()
            for _ in range(iterations):
                p = (rows @ w).sigmoid()
                hessian = (rows.mT * (p * (1 - p))) @ rows + penalty * torch.eye(6).double()
                w = w - torch.linalg.solve(hessian, rows.mT @ (p - y) + penalty * w)
            torch.testing.assert_close(weights[t, k], w[:-1], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(biases[t, k], w[-1], rtol=1e-9, atol=1e-12)


def test_irls_of_two_classes_is_one_regression():
    x, labels = features(5), torch.tensor([[1, 0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, -1, -1]])
    weights, biases = irls_weights(x, labels, 2, 1.0, 8)
    assert weights.shape == (2, 2, 5) and not weights[:, 1].any() and not biases[:, 1].any()
    against, _ = irls_weights(x, torch.where(labels == 1, 2, labels), 3, 1.0, 8)  # 0 against the rest, of three
    torch.testing.assert_close(weights[:, 0], against[:, 0])
    query = features(5)
    scores = query @ weights.mT + biases.unsqueeze(1)
    torch.testing.assert_close(scores.softmax(-1)[..., 0], (query @ weights[:, 0, :, None])[..., 0].add(
        biases[:, :1]).sigmoid())  # fmt: skip


@pytest.mark.parametrize("way", [2, 3])
def test_irls_gradients(way):
    labels = LABELS.clamp(max=way - 1)
    x, penalty = features(4).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, p: irls_weights(x, labels, way, p, 4), (x, penalty), fast_mode=True)
    (gradient,) = torch.autograd.grad(irls_weights(x, labels, way, penalty, 4)[0].square().sum(), x)
    assert not gradient[1, 5:].any() and gradient[1, :5].any()  # padding


def test_irls_survives_separable_images():
    x = (1000 * features(20)).float().requires_grad_()
    weights, biases = irls_weights(x, LABELS, 3, 1e-3, 10)
    weights.sum().backward()
    assert weights.isfinite().all() and biases.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_mode_against_a_general_solver(prior, scale):
    """Over the weights themselves, with the prior's covariance written out."""
    g = torch.Generator().manual_seed(3)
    known = torch.randn(9, 4, generator=g, dtype=torch.float64) * torch.tensor([1.0, 0.3, 2.0, 0.5])
    gaussian = PRIORS[prior](known, 5.0, scale)
    x = features(4)
    x = x * (LABELS >= 0).unsqueeze(-1)
    fit = fit_softmax(gaussian.covary(x) @ x.mT, LABELS, 3)
    assert float(fit.violation.max()) <= TOLERANCE
    weights = gaussian.mean + fit.alpha @ gaussian.covary(x)
    precision = torch.linalg.inv(gaussian.covary(torch.eye(4).double())).numpy()
    for t in range(2):
        keep = LABELS[t] >= 0
        rows, y, mean = x[t][keep].numpy(), LABELS[t][keep].numpy(), gaussian.mean.numpy()

        def objective(w, rows=rows, y=y, mean=mean):
            w = w.reshape(3, 4)
            logs = log_softmax(rows @ w.T, axis=1)
            error = np.exp(logs) - np.eye(3)[y]
            value = 0.5 * np.einsum("ki,ij,kj", w - mean, precision, w - mean) - logs[np.arange(len(y)), y].sum()
            return value, (error.T @ rows + (w - mean) @ precision).ravel()

        solution = minimize(objective, np.zeros(12), jac=True, method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(weights[t].numpy().ravel(), solution.x, rtol=0, atol=1e-6)
        assert np.abs(objective(weights[t].numpy().ravel())[1]).max() < 1e-9


@pytest.mark.parametrize("norm", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("kind", ["noise", "duplicates", "one image"])
def test_the_mode_of_difficult_images(norm, kind):
    g = torch.Generator().manual_seed(1)
    x = norm * torch.randn(3, 20, 50, generator=g, dtype=torch.float64)
    if kind != "noise":
        x = x[:, torch.arange(20) % (7 if kind == "duplicates" else 1)]
    labels = torch.stack([torch.arange(20)[torch.randperm(20, generator=g)] % 5 for _ in range(3)])
    fit = fit_softmax(x @ x.mT, labels, 5)
    y = torch.nn.functional.one_hot(labels, 5).double().mT
    assert float((fit.alpha - y + (fit.alpha @ x @ x.mT).softmax(1)).abs().max()) < 1e-9
    alone = fit_softmax(x[1:2] @ x[1:2].mT, labels[1:2], 5)
    torch.testing.assert_close(fit.alpha[1:2], alone.alpha, rtol=0, atol=1e-9)


def test_laplaces_covariance_is_the_inverse_of_the_curvature():
    x, prior = features(4) * (LABELS >= 0).unsqueeze(-1), torch.tensor([1.0, 0.2, 3.0, 0.5], dtype=torch.float64)
    query = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    fit = fit_softmax(x * prior @ x.mT, LABELS, 3)
    found = score_covariance(fit.curvatures, fit.total, query * prior @ x.mT, (query.square() * prior).sum(-1))
    for t in range(2):
        keep = LABELS[t] >= 0
        rows, weights = x[t][keep], fit.alpha[t] @ (x[t] * prior)

        def negative_log(w, rows=rows, y=LABELS[t][keep]):
            logs = (rows @ w.view(3, 4).mT).log_softmax(-1)
            return 0.5 * (w.view(3, 4).square() / prior).sum() - logs[torch.arange(len(y)), y].sum()

        inverse = torch.linalg.inv(torch.autograd.functional.hessian(negative_log, weights.flatten()))
        for q in range(3):
            scores = torch.kron(torch.eye(3).double(), query[t, q][None])
            torch.testing.assert_close(found[t, q], scores @ inverse @ scores.mT, rtol=1e-9, atol=1e-12)


def test_expected_probabilities():
    means = torch.tensor([[1.0, 0.0, -2.0], [3.0, 3.0, 0.0]], dtype=torch.float64)
    root = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariances = root @ root.mT
    found = expected_log_probabilities(means, covariances, 20000)
    drawn = np.random.default_rng(0).multivariate_normal(np.zeros(3), np.eye(3), 200_000)
    for m, c, f in zip(means.numpy(), covariances.numpy(), found.numpy(), strict=True):
        logs = log_softmax(m + drawn @ np.linalg.cholesky(c).T, axis=1)
        np.testing.assert_allclose(np.exp(f), np.exp(logsumexp(logs, axis=0)) / len(logs), atol=3e-3)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2).double())
    assert torch.equal(found, expected_log_probabilities(means, covariances, 20000))
    certain = expected_log_probabilities(means, torch.zeros(2, 3, 3).double(), 5)
    torch.testing.assert_close(certain, means.log_softmax(-1))
