from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.errors import PipelineError
from pipeline.methods.metaopt import MetaOpt
from pipeline.nets.conv4 import Conv4
from tests.methods import toy


def build(**options) -> MetaOpt:
    torch.manual_seed(1)
    return MetaOpt(Conv4((1, 6, 6), width=[3, 4]), **options).double()


def features(method: MetaOpt, images: torch.Tensor) -> torch.Tensor:
    return method.backbone(images.flatten(0, 1)).unflatten(0, images.shape[:2]).detach()


def ascent(x: torch.Tensor, labels: torch.Tensor, cost: float, ridge: float) -> torch.Tensor:
    """Weights of one task's SVM by thousands of small projected steps on the dual, row by row onto its simplex."""
    y = nn.functional.one_hot(labels, 4).double()
    hessian = x @ x.mT + ridge * torch.eye(len(x))
    alpha, rate = torch.zeros_like(y), 1 / torch.linalg.matrix_norm(hessian, 2)
    for _ in range(5000):
        short = cost * y - alpha - rate * (y - hessian @ alpha)  # what is left to the caps: at least 0, sum = cost
        ordered = short.sort(1, descending=True).values
        level = (ordered.cumsum(1) - cost) / torch.arange(1, 5)
        alpha = cost * y - (short - level.gather(1, (ordered > level).sum(1, keepdim=True) - 1)).clamp(min=0)
    return alpha.mT @ x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("head", ["svm", "ridge", "prototypes"])
def test_heads_by_definition(head, training):
    """Task by task: unequal shots, padding among support and queries; support and query embedded apart."""
    method, batch = build(head=head, cost=0.3, kernel_ridge=0.5, penalty=2.0, scale=1.7).train(training), toy.awkward()
    loss, metrics = method(batch)
    method = build().train(training)  # running averages of batch-norm as before
    support, query = features(method, batch.support), features(method, batch.query)
    losses = []
    for t in range(3):
        keep, asked = batch.support_labels[t] >= 0, batch.query_labels[t] >= 0
        x, labels, q = support[t][keep], batch.support_labels[t][keep], query[t][asked]
        y = nn.functional.one_hot(labels, 4).double()
        if head == "svm":
            logits = q @ ascent(x, labels, 0.3, 0.5).mT
        elif head == "ridge":
            logits = q @ x.mT @ (2 * torch.linalg.inv(x @ x.mT + 2 * torch.eye(len(x)))) @ y
        else:
            logits = -(q[:, None] - (y.mT @ x / y.sum(0)[:, None])[None]).square().mean(-1)
        logs = (1.7 * logits).log_softmax(-1)
        wrong = (logs.sum(-1) - logs.gather(1, batch.query_labels[t][asked, None])[:, 0]) / 3
        right = logs.gather(1, batch.query_labels[t][asked, None])[:, 0]
        losses += (-0.9 * right - 0.1 * wrong).tolist()
    assert float(loss.detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-7)
    assert float(metrics["violation"]) <= 1e-10


@pytest.mark.parametrize("options", [{}, {"head": "ridge"}, {"head": "prototypes"}, {"iterations_eval": 3}], ids=str)
def test_a_task_is_answered_alone_as_among_others(options):
    method, batch = build(**options).eval(), toy.awkward()
    whole = range(3) if options != {"iterations_eval": 3} else [2]  # padding is for the optimum
    with torch.no_grad():
        state = method.adapt(batch.support, batch.support_labels, 4)
        logits = method.classify(state, batch.query)
        for t in whole:
            alone, _, kept = toy.one(batch, t)
            found = method.classify(method.adapt(alone.support, alone.support_labels, 4), alone.query)
            torch.testing.assert_close(found[0], logits[t][kept], rtol=0, atol=1e-12)
    assert all(len(v) == 3 for v in state.values())
    assert method.extend(state, batch.support, batch.support_labels) is None


@pytest.mark.parametrize("head", ["svm", "ridge"])
def test_gradients_against_finite_differences(head):
    method, batch = build(head=head, penalty=1.0), toy.awkward()
    method(batch)[0].backward()
    g = torch.Generator().manual_seed(0)
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
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


def test_gamma_can_be_fixed_and_scales_the_logits():
    plain, scaled = build().eval(), build(scale=2.5, learn_scale=False).eval()
    batch = toy.awkward()
    logits = [m.classify(m.adapt(batch.support, batch.support_labels), batch.query) for m in (plain, scaled)]
    torch.testing.assert_close(2.5 * logits[0], logits[1])
    assert plain.scale.requires_grad and not scaled.scale.requires_grad


def test_adapts_without_a_graph():
    method, batch = build().eval(), toy.awkward()
    with torch.inference_mode():
        state = method.adapt(batch.support, batch.support_labels)
        assert method.classify(state, batch.query).isfinite().all()
    assert not state["weights"].requires_grad


def test_half_precision_backbone():
    method, batch = MetaOpt(Conv4((1, 6, 6), width=[3, 4])), toy.awkward(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = method(batch)
    loss.backward()
    assert float(metrics["violation"]) <= 1e-10 and method.scale.grad.isfinite()


@pytest.mark.parametrize("head", ["svm", "ridge"])
def test_learns(head):
    torch.manual_seed(0)
    method = MetaOpt(nn.Sequential(nn.Flatten(), nn.Linear(36, 16)), head=head, penalty=1.0)
    before = toy.accuracy(method)
    toy.train(method)
    assert toy.accuracy(method) > before + 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "tree"}, "choose one of svm, ridge, prototypes"),
        ({"cost": 0.0}, "cost=0.0 and penalty=50.0 must be above zero"),
        ({"kernel_ridge": -1.0}, "kernel_ridge=-1.0 not below"),
        ({"label_smoothing": 0.9}, "label_smoothing=0.9 must be between 0 and .5"),
        ({"iterations_eval": 0}, "iterations_eval=0 must be at least 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(PipelineError, match=message):
        build(**options)
