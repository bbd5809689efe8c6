from __future__ import annotations

import math

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.functional.distances import squared_euclidean_exact
from pipeline.functional.nca import log_right_neighbour, pair_losses
from pipeline.methods.nca import NCA, OBJECTIVES
from pipeline.nets.mlp import MLP
from tests.methods import toy

SHAPE = (1, 6, 6)


def build(**options) -> NCA:
    torch.manual_seed(1)
    return NCA(MLP(SHAPE, widths=[7]), **options).double()


def objective(d: torch.Tensor, labels: torch.Tensor, kind: str) -> float:
    """Of one task, by loops over images."""
    there = [i for i in range(len(labels)) if labels[i] >= 0]
    values = []
    for i in there:
        friends = [j for j in there if j != i and labels[j] == labels[i]]
        others = [k for k in there if labels[k] != labels[i]]
        if not friends:
            continue
        e = {j: math.exp(-d[i, j].item()) for j in there if j != i}
        p = sum(e[j] for j in friends) / sum(e.values())
        z = sum(e[k] for k in others)
        if kind in ("expected", "log"):
            values.append(1 - p if kind == "expected" else -math.log(p))
        else:
            values += [d[i, y].item() + math.log(z + (e[y] if kind == "pairs" else 0)) for y in friends]
    return sum(values) / len(values)


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("dim", [None, 3])
def test_objective_by_definition(kind, squared, dim):
    method, batch = build(objective=kind, squared=squared, dim=dim), toy.awkward()
    labels = torch.cat([batch.support_labels, batch.query_labels], 1)
    values = []
    for t in range(3):
        x = method.backbone(torch.cat([batch.support, batch.query], 1)[t]) @ method.transform.weight.T
        d = (x[:, None] - x[None]).norm(dim=-1) ** (2 if squared else 1)
        values.append(objective(d, labels[t], kind))
    assert method(batch)[0].item() == pytest.approx(sum(values) / 3, abs=1e-9)


@pytest.mark.parametrize("answer", ["soft", "nearest", "class_mean"])
def test_answers_by_definition(answer):
    method, batch = build(answer=answer).eval(), toy.awkward()
    logits = method.classify(method.adapt(batch.support, batch.support_labels, 4), batch.query)
    for t in range(3):
        support, query = (method.transform(method.backbone(x[t])) for x in (batch.support, batch.query))
        d = (query[:, None] - support[None]).square().sum(-1)[:, batch.support_labels[t] >= 0]
        labels = batch.support_labels[t][batch.support_labels[t] >= 0]
        for c in range(4):
            own = labels == c
            if answer == "soft":
                expected = (-d).softmax(1)[:, own].sum(1)
                torch.testing.assert_close(logits[t].softmax(-1)[:, c], expected, rtol=0, atol=1e-10)
            else:
                mean = (query - support[batch.support_labels[t] == c].mean(0)).square().sum(-1)
                expected = -(d[:, own].amin(1) if answer == "nearest" else mean)
                torch.testing.assert_close(logits[t, :, c], expected, rtol=0, atol=1e-10)


def test_images_without_another_of_their_class_or_of_another_class():
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    d = squared_euclidean_exact(x, x).requires_grad_()
    labels = torch.tensor([[0, 1, 2, 3, 4], [1, 1, 1, 1, -1], [0, 0, 1, -1, -1]])
    log_right, counted = log_right_neighbour(d, labels)
    assert counted.tolist() == [[False] * 5, [True] * 4 + [False], [True, True, False, False, False]]
    torch.testing.assert_close(log_right[1], torch.zeros(5).double())  # all neighbours are right
    (log_right.sum() + pair_losses(d, labels, False).sum()).backward()
    assert d.grad.isfinite().all() and pair_losses(d, labels, False)[:2].tolist() == [0, 0]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_gradients(kind):
    labels = torch.tensor([[0, 0, 1, 2, 1, -1], [1, 0, 0, 1, 1, 3]])
    x = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def value(x):
        d = squared_euclidean_exact(x, x)
        if kind in ("negatives", "pairs"):
            return pair_losses(d, labels, kind == "pairs")
        return log_right_neighbour(d, labels)[0].exp() if kind == "expected" else log_right_neighbour(d, labels)[0]

    assert torch.autograd.gradcheck(value, x)


def test_far_apart_images_have_a_finite_loss_and_gradient():
    batch = toy.awkward()
    for kind in OBJECTIVES:
        method = build(objective=kind)
        loss, _ = method(type(batch)(**{**vars(batch), "support": 1e4 * batch.support, "query": 1e4 * batch.query}))
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in method.parameters())


def test_the_matrix_starts_as_an_orthogonal_projection():
    for dim in (3, 7):
        a = build(dim=dim).transform.weight
        torch.testing.assert_close(a @ a.T, torch.eye(dim).double(), atol=1e-6, rtol=0)


def test_extend_where_classes_are_means():
    method, batch = build(answer="class_mean").eval().float(), toy.awkward(dtype=torch.float32)
    state = method.adapt(batch.support, batch.support_labels, 4)
    extended = method.extend(state, batch.query[:, :2], torch.tensor([[4, 5]] * 3))
    assert torch.equal(method.classify(extended, batch.query)[..., :4], method.classify(state, batch.query))
    with pytest.raises(PipelineError, match="numbered from 4"):
        method.extend(state, batch.query[:, :2], torch.tensor([[3, 4]] * 3))
    assert build().extend(state, batch.query[:, :2], torch.tensor([[4, 5]] * 3)) is None


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_learns(kind):
    torch.manual_seed(0)
    method = NCA(MLP((1, toy.SIDE, toy.SIDE), widths=[24]), objective=kind, dim=12)
    before = toy.accuracy(method)
    toy.train(method, steps=60)
    after = toy.accuracy(method)
    assert after > max(0.6, before + 0.15), (before, after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "sum"}, "choose one of expected, log, negatives, pairs"),
        ({"answer": "knn"}, "choose one of class_mean, nearest, soft"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(PipelineError, match=message):
        build(**options)
