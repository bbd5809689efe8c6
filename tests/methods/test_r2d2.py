from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.errors import PipelineError
from pipeline.methods.r2d2 import R2D2
from pipeline.nets.conv4 import Conv4
from tests.methods import toy


def build(**options) -> R2D2:
    torch.manual_seed(1)
    return R2D2(Conv4((1, 6, 6), width=[3, 4]), **options).double()


def features(method: R2D2, images: torch.Tensor) -> torch.Tensor:
    return method.backbone(images.flatten(0, 1)).unflatten(0, images.shape[:2])


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_ridge_by_definition(joint, training):
    """Task by task and image by image: unequal shots, padding among support and queries."""
    method, batch = build(joint_forward=joint, penalty=0.5, scale=3.0).train(training), toy.awkward()
    with torch.no_grad():
        method.bias.fill_(0.7)
    loss, metrics = method(batch)
    method = build(joint_forward=joint).train(training)  # running averages of batch-norm as before
    if joint:
        both = features(method, torch.cat([batch.support, batch.query], 1))
        support, query = both[:, :8], both[:, 8:]
    else:
        support, query = features(method, batch.support), features(method, batch.query)
    losses, right = [], []
    for t in range(3):
        keep = batch.support_labels[t] >= 0
        x = torch.cat([support[t][keep], torch.ones(int(keep.sum()), 1)], 1) / int(keep.sum()) ** 0.5
        y = nn.functional.one_hot(batch.support_labels[t][keep], 4).double() / int(keep.sum()) ** 0.5
        w = torch.linalg.solve(x.mT @ x + 0.5 * torch.eye(x.shape[1]), x.mT @ y)
        for q, label in zip(query[t], batch.query_labels[t], strict=True):
            if label >= 0:
                logits = 3.0 * (q @ w[:-1] + w[-1]) + 0.7
                losses.append(-float(logits.detach().log_softmax(0)[label]))
                right.append(float(logits.argmax() == label))
    assert float(loss.detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert float(metrics["accuracy"]) == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("options", [{}, {"solver": "logistic", "penalty": 1.0}], ids=str)
def test_a_task_is_answered_alone_as_among_others(options):
    method, batch = build(**options).eval(), toy.awkward()
    with torch.no_grad():
        logits = method.classify(method.adapt(batch.support, batch.support_labels, 4), batch.query)
        for t in range(3):
            alone, _, kept = toy.one(batch, t)
            state = method.adapt(alone.support, alone.support_labels, 4)
            torch.testing.assert_close(method.classify(state, alone.query)[0], logits[t][kept], rtol=0, atol=1e-12)
            assert {k: v.shape for k, v in state.items()} == {"weights": (1, 4, 4), "biases": (1, 4)}
    assert method.extend(state, alone.support, alone.support_labels) is None


@pytest.mark.parametrize(
    "options",
    [{"learn_penalty": True}, {"solver": "logistic", "penalty": 2.0, "iterations": 3, "learn_penalty": True}],
    ids=str,
)
def test_gradients_against_finite_differences(options):
    method, batch = build(**options), toy.awkward()
    method(batch)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    own = [n for n, _ in method.named_parameters() if not n.startswith("backbone")]
    assert own == (["log_penalty", "scale", "bias"] if "solver" not in options else ["log_penalty"])
    g = torch.Generator().manual_seed(0)
    for name, parameter in method.named_parameters():
        step = torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 1e-6
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                parameter += sign * step
            values.append(float(method(batch)[0].detach()))
        with torch.no_grad():
            parameter += step
        expected = (values[0] - values[1]) / 2e-6
        assert float((parameter.grad * step / 1e-6).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-8), name


def test_two_classes_of_logistic_are_a_sigmoid():
    method = build(solver="logistic", penalty=1.0, iterations=10).eval()
    batch = toy.episodes(0, tasks=2, way=2, shot=3)
    logits = method.classify(method.adapt(batch.support.double(), batch.support_labels), batch.query.double())
    assert not logits[..., 1].any() and logits[..., 0].any()


@pytest.mark.parametrize("options", [{}, {"solver": "logistic", "iterations": 3, "penalty": 1.0}], ids=str)
def test_learns(options):
    torch.manual_seed(0)
    method = R2D2(nn.Sequential(nn.Flatten(), nn.Linear(36, 16)), **options)
    before = toy.accuracy(method)
    toy.train(method)
    assert toy.accuracy(method) > before + 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "lasso"}, "choose one of ridge, logistic"),
        ({"penalty": 0.0}, "penalty=0.0 must be above zero"),
        ({"iterations": 0}, "iterations=0 at least 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(PipelineError, match=message):
        build(**options)
