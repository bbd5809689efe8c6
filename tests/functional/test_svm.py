from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from pipeline.functional.capped_qp import TOLERANCE, Program, interior_point
from pipeline.functional.svm import crammer_singer, svm_weights, svm_weights_inexact

SIZES = [(5, 1, 40), (5, 5, 40), (5, 15, 30), (20, 1, 64), (2, 8, 3)]  # way, shot, features


def draw(way: int, shot: int, width: int, norm: float = 3.0, kind: str = "classes", tasks: int = 3):
    """Features [T, n, d] whose mean norm is ``norm``, and shuffled labels."""
    g = torch.Generator().manual_seed(way * 100 + shot)
    n = way * shot
    labels = torch.stack([torch.arange(way).repeat(shot)[torch.randperm(n, generator=g)] for _ in range(tasks)])
    x = torch.randn(tasks, n, width, generator=g, dtype=torch.float64)
    if kind == "classes":
        x = x + torch.randn(tasks, way, width, generator=g, dtype=torch.float64)[torch.arange(tasks)[:, None], labels]
    elif kind == "alike":  # like rectified features: most of each is common to all
        x = x * 0.3 + 1
    elif kind == "duplicates":  # of one label and of several
        x = x.gather(1, torch.randint(n, (tasks, n, 1), generator=g).expand(-1, -1, width))
    elif kind == "one image":
        x = x[:, :1].repeat(1, n, 1)
    elif kind == "rank 2":
        x = x[..., :2] @ torch.randn(tasks, 2, width, generator=g, dtype=torch.float64)
    return x * norm / x.norm(dim=-1).mean(), labels


def onehot(labels: Tensor, way: int) -> Tensor:
    return torch.nn.functional.one_hot(labels, way).double().mT


def residuals(x: Tensor, labels: Tensor, way: int, cost: float, ridge: float, alpha: Tensor, multipliers: Tensor):
    """What each condition of the optimum is missed by: [4]."""
    y = onehot(labels, way)
    hessian = x @ x.mT + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    slope = alpha @ hessian - y + multipliers  # must be the same for all classes: minus the price of the sum
    slack = cost * y - alpha
    return torch.stack(
        [
            (slope - slope.mean(1, keepdim=True)).abs().max(),
            alpha.sum(1).abs().max(),
            -torch.minimum(slack, multipliers).min().clamp(max=0),
            torch.minimum(slack.abs(), multipliers.abs()).max(),  # one of the two is zero
        ]
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["noise", "classes", "alike", "duplicates", "one image", "rank 2"])
@pytest.mark.parametrize("norm", [1e-2, 1.0, 10.0])
def test_conditions_of_the_optimum(size, kind, norm):
    way = size[0]
    x, labels = draw(*size, norm, kind)
    found, _, _ = crammer_singer(x @ x.mT, labels, way)
    assert float(found.violation.max()) <= TOLERANCE
    assert float(residuals(x, labels, way, 0.1, 1.0, found.alpha, found.multipliers).max()) < 1e-10


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["noise", "alike", "duplicates", "one image", "rank 2"])
@pytest.mark.parametrize("norm", [1000.0])
def test_large_features_are_solved_up_to_rounding(size, kind, norm):
    """The Hessian's condition reaches 10^8, and multipliers are differences of numbers up to 10^5."""
    way = size[0]
    x, labels = draw(*size, norm, kind)
    found, _, _ = crammer_singer(x @ x.mT, labels, way)
    assert float(found.violation.max()) <= TOLERANCE
    assert float(residuals(x, labels, way, 0.1, 1.0, found.alpha, found.multipliers).max()) < 1e-7


@pytest.mark.parametrize("kind", ["noise", "classes", "alike", "duplicates", "rank 2"])
@pytest.mark.parametrize("norm", [0.1, 3.0, 100.0])
def test_without_a_ridge_the_weights_are_the_limit(kind, norm):
    """Coefficients of equal images are not unique then; weights are."""
    x, labels = draw(5, 5, 40, norm, kind)
    weights, violation = svm_weights(x, labels, 5, ridge=0.0)
    assert float(violation.max()) <= TOLERANCE
    near, _ = svm_weights(x, labels, 5, ridge=1e-7 * norm**2)
    torch.testing.assert_close(weights, near, rtol=1e-4, atol=1e-5 * norm)


@pytest.mark.parametrize("size", [(3, 1, 4), (3, 3, 4), (2, 5, 3), (5, 2, 6)], ids=str)
@pytest.mark.parametrize("norm", [0.5, 3.0])
def test_against_a_general_solver(size, norm):
    way, cost, ridge = size[0], 0.3, 0.5
    x, labels = draw(*size, norm, tasks=2)
    found, _, _ = crammer_singer(x @ x.mT, labels, way, cost, ridge)
    for t in range(2):
        y = onehot(labels[t : t + 1], way)[0].numpy()
        hessian = np.kron(np.eye(way), (x[t] @ x[t].mT).numpy()) + ridge * np.eye(y.size)
        sums = np.kron(np.ones((1, way)), np.eye(y.shape[1]))

        def objective(a, hessian=hessian, y=y):
            return 0.5 * a @ hessian @ a - y.ravel() @ a

        solution = minimize(
            objective, np.zeros(y.size), jac=lambda a, h=hessian, y=y: h @ a - y.ravel(), method="SLSQP",
            bounds=[(None, cost * v) for v in y.ravel()], options={"ftol": 1e-15, "maxiter": 500},
            constraints={"type": "eq", "fun": lambda a, s=sums: s @ a, "jac": lambda a, s=sums: s},
        )  # fmt: skip
        mine = found.alpha[t].numpy().ravel()
        np.testing.assert_allclose(mine, solution.x, rtol=0, atol=1e-6)
        assert objective(mine) <= objective(solution.x) + 1e-12


@pytest.mark.parametrize("size", [(5, 1, 8), (3, 3, 5), (5, 4, 6)], ids=str)
@pytest.mark.parametrize("ridge", [1.0, 0.0])
@pytest.mark.parametrize("norm", [0.3, 2.0])
def test_gradient_against_finite_differences(size, ridge, norm):
    x, labels = draw(*size, norm, tasks=2)
    ridge = max(ridge, 0.01 * norm**2 if size[0] * size[1] > size[2] else 0.0)  # more images than features: unique
    g = torch.Generator().manual_seed(0)

    def loss(x: Tensor) -> Tensor:
        weights, violation = svm_weights(x, labels, size[0], 0.1, ridge)
        assert float(violation.max()) <= TOLERANCE
        return (weights * direction).sum() + weights.square().sum()

    for _ in range(5):
        direction = torch.randn(2, size[0], size[2], generator=g, dtype=x.dtype)
        step = torch.randn(x.shape, generator=g, dtype=x.dtype)
        (gradient,) = torch.autograd.grad(loss(x.requires_grad_()), x)
        x = x.detach()
        differences = (loss(x + 1e-5 * step) - loss(x - 1e-5 * step)) / 2e-5
        assert float((gradient * step).sum()) == pytest.approx(float(differences), rel=1e-6, abs=1e-8)
    found, _, _ = crammer_singer(x @ x.mT, labels, size[0], 0.1, ridge)
    assert 0 < int(found.free.sum()) < found.free.numel() or norm == 2.0  # some constraints are active


def loss_gradient(x: Tensor, labels: Tensor, way: int) -> Tensor:
    """Of a cross-entropy of fixed queries with respect to the support."""
    g = torch.Generator().manual_seed(5)
    query = torch.randn(len(x), 10, x.shape[2], generator=g, dtype=torch.float64) / x.shape[2] ** 0.5
    truth = torch.randint(way, (len(x) * 10,), generator=g)
    x = x.detach().clone().requires_grad_()
    logits = query.to(x) @ svm_weights(x, labels, way)[0].mT
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), truth).backward()
    assert x.grad is not None
    return x.grad.double()


@pytest.mark.parametrize("size", [(5, 1, 1600), (5, 5, 64), (5, 15, 64), (20, 1, 64)], ids=str)
@pytest.mark.parametrize("kind", ["noise", "alike", "duplicates", "one image", "rank 2"])
@pytest.mark.parametrize("norm", [1e-2, 3.0, 1000.0])
def test_float32_gradients_are_as_good_as_float32(size, kind, norm):
    x, labels = draw(*size, norm, kind, tasks=2)
    x = x.float().double()
    exact, found = loss_gradient(x, labels, size[0]), loss_gradient(x.float(), labels, size[0])
    assert float((found - exact).norm() / exact.norm()) < 1e-5


def test_tasks_do_not_see_each_other():
    """Easy tasks beside one that needs the interior-point method."""
    easy, hard = draw(5, 5, 40), draw(5, 5, 40, 1000.0, "rank 2")
    x, labels = (torch.cat([a, b[:1]]) for a, b in zip(easy, hard, strict=True))
    together, _ = svm_weights(x, labels, 5)
    for t in range(4):
        alone, _ = svm_weights(x[t : t + 1], labels[t : t + 1], 5)
        torch.testing.assert_close(together[t], alone[0], rtol=1e-9, atol=1e-12)


def test_padding_is_as_if_it_were_not_there():
    x, labels = draw(3, 4, 10, tasks=2)
    more = torch.cat([x[:, :7], torch.full((2, 2, 10), 7.0, dtype=x.dtype), x[:, 7:]], 1).requires_grad_()
    padding = torch.full((2, 2), -1)
    padded = torch.cat([labels[:, :7], padding, labels[:, 7:]], 1)
    weights, violation = svm_weights(more, padded, 3)
    direction = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    weights.backward(direction)
    x.requires_grad_()
    expected, _ = svm_weights(x, labels, 3)
    expected.backward(direction)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.cat([more.grad[:, :7], more.grad[:, 9:]], 1), x.grad, rtol=1e-12, atol=1e-13)
    assert not more.grad[:, 7:9].any() and float(violation.max()) <= TOLERANCE


def test_unequal_shots_and_single_class():
    x, labels = draw(3, 4, 10, tasks=1)
    labels[0, labels[0] == 2] = torch.tensor([2, 0, 0, 0])
    found, _, _ = crammer_singer(x @ x.mT, labels, 3)
    assert float(residuals(x, labels, 3, 0.1, 1.0, found.alpha, found.multipliers).max()) < 1e-10
    assert float(svm_weights(x, torch.zeros_like(labels), 1)[0].abs().max()) < 1e-12


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_interior_point_method_alone(size):
    x, labels = draw(*size)
    exact, program, _ = crammer_singer(x @ x.mT, labels, size[0])
    alpha, slacks, multipliers, _ = interior_point(program, 30)
    assert float((alpha - program.caps + slacks).abs().max()) < 1e-9
    torch.testing.assert_close(multipliers, exact.multipliers, rtol=0, atol=1e-8)
    few = svm_weights_inexact(x, labels, size[0], iterations=3)
    many = svm_weights_inexact(x, labels, size[0], iterations=30)
    exact_weights, _ = svm_weights(x, labels, size[0])
    torch.testing.assert_close(many, exact_weights, rtol=0, atol=1e-7)
    assert float((few - exact_weights).abs().max()) > 1e-4


def test_what_cannot_be_solved_ends_and_is_reported():
    x, labels = draw(5, 2, 8)
    x[1, 3, 2] = torch.nan
    x.requires_grad_()
    weights, violation = svm_weights(x, labels, 5)
    assert (violation <= TOLERANCE).tolist() == [True, False, True]
    weights.sum().backward()
    assert x.grad.isnan().flatten(1).any(1).tolist() == [False, True, False]
    program = Program(torch.eye(2).double()[None], torch.ones(1, 3, 2).double(), torch.zeros(1, 3, 2).double())
    assert all(part.shape[0] == 1 for part in interior_point(program, 40))  # caps without an interior


def test_second_derivatives_are_refused():
    x, labels = draw(3, 1, 4)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(svm_weights(x, labels, 3)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
