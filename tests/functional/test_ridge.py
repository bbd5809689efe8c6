from __future__ import annotations

import pytest
import torch

from pipeline.functional.gram import combine, gram, linear_scores, own_inner
from pipeline.functional.ridge import metaopt_ridge_weights, r2d2_weights

LABELS = torch.tensor([[2, 0, 1, 1, 0, 1, 2], [1, 2, 0, 0, 0, -1, -1]])


def features(width: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, 7, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def by_definition(x, labels, penalty):
    """Of one task: the normal equations of [x, 1] / sqrt(N) against one-hot / sqrt(N)."""
    x, labels = x[labels >= 0], labels[labels >= 0]
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) / len(x) ** 0.5
    y = torch.nn.functional.one_hot(labels, 3).to(x) / len(x) ** 0.5
    both = torch.linalg.inv(rows.mT @ rows + penalty * torch.eye(rows.shape[1]).to(x)) @ rows.mT @ y
    return both[:-1].mT, both[-1]


@pytest.mark.parametrize("width", [3, 6, 20])
@pytest.mark.parametrize("form", ["primal", "woodbury", "smaller"])
@pytest.mark.parametrize("penalty", [50.0, 0.1])
def test_both_forms_are_the_definition(width, form, penalty):
    x = features(width)
    weights, biases = r2d2_weights(x, LABELS, 3, penalty, form)
    for t in range(2):
        expected = by_definition(x[t], LABELS[t], penalty)
        torch.testing.assert_close(weights[t], expected[0], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(biases[t], expected[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("form", ["primal", "woodbury"])
def test_gradients(form):
    x, penalty = features(5).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, p: r2d2_weights(x, LABELS, 3, p, form), (x, penalty), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x, p: metaopt_ridge_weights(x, LABELS, 3, p), (x, penalty), fast_mode=True)
    (gradient,) = torch.autograd.grad(r2d2_weights(x, LABELS, 3, penalty, form)[0].square().sum(), x)
    assert not gradient[1, 5:].any() and gradient[1, :5].any()  # padding


@pytest.mark.parametrize("form", ["primal", "woodbury"])
@pytest.mark.parametrize("norm", [1e-2, 1.0, 1e3])
def test_float32_is_as_good_as_float32(form, norm):
    """Rows that resemble each other, whose inner products dwarf the penalty."""
    x = (norm * (1 + 1e-3 * features(4 if form == "primal" else 300))).float()
    x[:, 1] = x[:, 0]

    def solve(x):
        x = x.clone().requires_grad_()
        weights, biases = r2d2_weights(x, LABELS, 3, 0.01, form)
        (gradient,) = torch.autograd.grad((weights.square()).sum() + biases.sum(), x)
        return weights.detach().double(), biases.detach().double(), gradient.double()

    for found, exact, bound in zip(solve(x), solve(x.double()), (1e-6, 1e-6, 1e-3), strict=True):
        assert float((found - exact).norm() / exact.norm()) < bound


def test_metaopt_ridge_is_the_definition():
    x = features(9)
    weights = metaopt_ridge_weights(x, LABELS, 3, 5.0)
    real = x[1, :5]
    y = torch.nn.functional.one_hot(LABELS[1, :5], 3).double()
    expected = 2 * torch.linalg.inv(real @ real.mT + 5 * torch.eye(5).double()) @ y
    torch.testing.assert_close(weights[1], expected.mT @ real, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(metaopt_ridge_weights(x, LABELS, 3, 5.0, factor=1.0), weights / 2)


@pytest.mark.parametrize("width", [5, 3000])  # one chunk and several
def test_products_and_their_gradients(width):
    x = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(1))
    a = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wide = x.double()
    torch.testing.assert_close(gram(x), wide @ wide.mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(combine(a, x), (a @ wide).float())
    x.requires_grad_()
    a.requires_grad_()
    mine = torch.autograd.grad(gram(x).pow(2).sum() + combine(a, x).double().pow(3).sum(), (x, a))
    wide.requires_grad_()
    theirs = torch.autograd.grad((wide @ wide.mT).pow(2).sum() + (a @ wide).pow(3).sum(), (wide, a))
    for found, exact in zip(mine, theirs, strict=True):
        assert float((found - exact).norm() / exact.norm()) < 1e-6
    assert mine[0].dtype == torch.float32 and mine[1].dtype == torch.float64


@pytest.mark.parametrize("rows", [1, 25, 26, 60])  # blocks of a symmetric product
def test_symmetric_products(rows):
    x = torch.randn(2, rows, 2500, generator=torch.Generator().manual_seed(1))
    found = own_inner(x)
    torch.testing.assert_close(found, x.double() @ x.double().mT, rtol=0, atol=1e-10)
    assert torch.equal(found, found.mT) and found.dtype == torch.float64


def test_scores_differentiate_twice():
    x, w = features(4).requires_grad_(), features(4)[:, :3].clone().requires_grad_()
    torch.testing.assert_close(linear_scores(x, w), x @ w.mT)
    assert torch.autograd.gradcheck(linear_scores, (x, w)) and torch.autograd.gradgradcheck(linear_scores, (x, w))


def test_half_precision_is_raised():
    x = features(6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        weights, _ = r2d2_weights(x, LABELS, 3, 1.0)
    torch.testing.assert_close(weights, r2d2_weights(x.float(), LABELS, 3, 1.0)[0], rtol=0, atol=0)
