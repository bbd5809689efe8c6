from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from pipeline.errors import PipelineError
from pipeline.methods.matching import Matching
from pipeline.nets.conv4 import Conv4
from pipeline.nets.full_context import READINGS, QueryContext, SupportContext
from pipeline.nets.mlp import MLP
from tests.methods import toy

SHAPE = (1, 6, 6)


def build(**options) -> Matching:
    torch.manual_seed(1)
    return Matching(MLP(SHAPE, widths=[7]), **options).double()


def probabilities(method: Matching, batch, distance) -> list[list[torch.Tensor]]:
    """Query by query and support image by support image, of every task."""
    out = []
    for t in range(3):
        support, query = (method.backbone(x[t]) for x in (batch.support, batch.query))
        out.append([])
        for q in query:
            weights = {i: torch.exp(-distance(q, support[i])) for i, c in enumerate(batch.support_labels[t]) if c >= 0}
            p = [sum(w for i, w in weights.items() if batch.support_labels[t, i] == c) for c in range(batch.way)]
            out[-1].append(torch.stack(p) / sum(weights.values()))
    return out


DEFINITIONS = {
    "cosine": lambda x, y: -(x @ y) / (x.norm() + 1e-8) / (y.norm() + 1e-8),
    "squared_euclidean": lambda x, y: (x - y).square().sum(),
    "euclidean": lambda x, y: (x - y).norm(),
    "dot": lambda x, y: -(x @ y),
}


@pytest.mark.parametrize("distance", DEFINITIONS)
@pytest.mark.parametrize("training", [True, False])
def test_attention_by_definition(distance, training):
    """Unequal shots, shuffled support, unequal numbers of queries, padding."""
    method, batch = build(distance=distance).train(training), toy.awkward()
    expected = probabilities(method, batch, DEFINITIONS[distance])
    found = method.classify(method.adapt(batch.support, batch.support_labels, batch.way), batch.query).exp()
    losses = []
    for t in range(3):
        torch.testing.assert_close(found[t], torch.stack(expected[t]).clamp(1e-8, 1 - 1e-8), rtol=0, atol=1e-10)
        losses += [-p[c].log() for p, c in zip(expected[t], batch.query_labels[t], strict=True) if c >= 0]
    assert method(batch)[0].item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-8)


@pytest.mark.parametrize("learn_scale", [False, True])
def test_a_scale_sharpens_the_attention(learn_scale):
    method, batch = build(scale=7.5, learn_scale=learn_scale), toy.awkward()
    expected = probabilities(method, batch, lambda x, y: 7.5 * DEFINITIONS["cosine"](x, y))
    loss = method(batch)[0]
    losses = [-p[c].log() for t in range(3) for p, c in zip(expected[t], batch.query_labels[t], strict=True) if c >= 0]
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-8)
    loss.backward()
    learned = [name for name, parameter in method.named_parameters() if name == "scale" and parameter.grad.abs() > 0]
    assert learned == (["scale"] if learn_scale else [])


def test_a_class_with_more_images_gets_more():
    method = build().eval()
    image = torch.ones(1, 1, *SHAPE, dtype=torch.float64)
    state = method.adapt(image.expand(-1, 4, -1, -1, -1), torch.tensor([[1, 0, 1, 1]]))
    torch.testing.assert_close(method.classify(state, image).exp(), torch.tensor([[[0.25, 0.75]]]).double())


def test_probabilities_stay_away_from_zero_and_one():
    method, batch = build(distance="squared_euclidean").eval(), toy.awkward()
    logits = method.classify(method.adapt(1e3 * batch.support, batch.support_labels, 4), 1e3 * batch.query)
    assert logits.min().item() == pytest.approx(torch.tensor(1e-8).double().log().item())
    assert logits.max() < 0 and method(batch)[0].isfinite()


@pytest.mark.parametrize("prediction", ["ravi", "closer"])
def test_predictions_of_official_code_by_definition(prediction):
    method, batch = build(prediction=prediction).eval(), toy.awkward()
    found = method.classify(method.adapt(batch.support, batch.support_labels, 4), batch.query)
    losses = []
    for t in range(3):
        support, query = (method.backbone(x[t]) for x in (batch.support, batch.query))
        for j, q in enumerate(query):
            eps = 1e-5 if prediction == "closer" else 0.0
            cos = torch.stack([(q @ s) / (q.norm() + eps) / (s.norm() + eps) for s in support])
            cos, labels = (x[batch.support_labels[t] >= 0] for x in (cos, batch.support_labels[t]))
            items = cos if prediction == "ravi" else (100 * cos.relu()).softmax(0)
            row = torch.stack([items[labels == c].sum() for c in range(4)])
            row = row if prediction == "ravi" else (row + 1e-6).log()
            torch.testing.assert_close(found[t, j], row, rtol=0, atol=1e-9)
            if batch.query_labels[t, j] >= 0:
                row = row.log_softmax(0) if prediction == "ravi" else row
                losses.append(-row[batch.query_labels[t, j]])
    assert method(batch)[0].item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-9)


def reference_full_context(method: Matching, support, query, reading: str, unrolls: int):
    """One task without padding, [S, D] and [Q, D], by PyTorch's own cells."""

    def cell(x, h, c, w):
        i, f, g, o = (w[0] @ x + w[1] @ h + w[2] + w[3]).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def run(lstm: nn.LSTM, items):
        w = lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, lstm.bias_hh_l0
        h = c = torch.zeros(items.shape[1], dtype=items.dtype)
        out = []
        for x in items:
            h, c = cell(x, h, c, w)
            out.append(h)
        return torch.stack(out)

    context = method.support_context
    backward = run(context.backwards, support.flip(0))
    g = run(context.forwards, support) + (backward.flip(0) if context.aligned else backward) + support
    f = method.query_context
    w, out = (f.weight_ih, f.weight_hh, f.bias_ih, f.bias_hh), []
    for x in query:
        h, c = torch.zeros_like(x) if reading == "ravi" else x, torch.zeros_like(x)
        for k in range(len(support) if reading == "closer" else unrolls):
            r = g.mean(0) if reading == "ravi" and k == 0 else (g @ h).softmax(0) @ g
            if reading in ("closer", "ravi"):
                new, c = cell(torch.cat([x, r]), h, c, w)
            else:
                new, c = cell(x, torch.cat([h, r]) if reading == "concat" else h + r, c, w)
            h = new + x
        out.append(h)
    return g, torch.stack(out)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("unrolls", [1, 3])
def test_full_context_by_definition(reading, aligned, unrolls):
    method = build(full_context=True, reading=reading, aligned=aligned, unrolls=unrolls).eval()
    batch = toy.awkward()
    for task in range(3):
        alone, _, _ = toy.one(batch, task)
        support, query = (method.backbone(x[0]) for x in (alone.support, alone.query))
        g, f = reference_full_context(method, support, query, reading, unrolls)
        cos = torch.stack([torch.stack([(q @ s) / (q.norm() + 1e-8) / (s.norm() + 1e-8) for s in g]) for q in f])
        members = (alone.support_labels[0][:, None] == torch.arange(4)).double()
        state = method.adapt(alone.support, alone.support_labels, 4)
        torch.testing.assert_close(state["support"][0], g, rtol=0, atol=1e-10)
        logits = method.classify(state, alone.query)
        torch.testing.assert_close(logits[0].exp(), cos.softmax(1) @ members, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, *({"full_context": True, "reading": reading} for reading in READINGS)])
def test_a_task_is_the_same_alone_and_with_others(options):
    method, batch = build(**options).eval(), toy.awkward()
    together = method.classify(method.adapt(batch.support, batch.support_labels, 4), batch.query)
    for task in range(3):
        alone, _, queries = toy.one(batch, task)
        logits = method.classify(method.adapt(alone.support, alone.support_labels, 4), alone.query)
        torch.testing.assert_close(logits[0], together[task][queries], rtol=0, atol=1e-10)


def test_order_of_the_support():
    """Matters to full context, and only to it; training draws an order, evaluation keeps the one it is given."""
    batch, order = toy.awkward(), torch.tensor([4, 2, 0, 7, 6, 1, 5, 3])

    def logits(method, order):
        state = method.adapt(batch.support[:, order], batch.support_labels[:, order], 4)
        return method.classify(state, batch.query)

    as_given = torch.arange(8)
    plain, full = build().eval(), build(full_context=True).eval()
    torch.testing.assert_close(logits(plain, order), logits(plain, as_given))
    assert (logits(full, order) - logits(full, as_given)).abs().max() > 1e-4
    assert torch.equal(logits(full, order), logits(full, order))
    full.train()
    assert (logits(full, as_given) - logits(full, as_given)).abs().max() > 1e-4
    kept = build(full_context=True, shuffle_support=False).train()
    assert torch.equal(logits(kept, as_given), logits(kept, as_given))


def test_shuffled_order_is_uniform_and_passes_padding_over():
    """The state of each image in a bidirectional pass tells which came before it: all orders of three come up."""
    torch.manual_seed(0)
    context = SupportContext(2).double()
    items = torch.randn(1, 4, 2).double().expand(600, -1, -1)
    present = torch.tensor([True, False, True, True]).expand(600, -1)
    found = context(items, present, True)[:, present[0]].detach()
    counts = Counter(tuple(row.flatten().mul(1e6).round().long().tolist()) for row in found)
    assert len(counts) == 6 and min(counts.values()) > 60


@pytest.mark.parametrize("reading", READINGS)
def test_gradients_of_full_context(reading):
    torch.manual_seed(0)
    support, query = SupportContext(3).double(), QueryContext(3, reading).double()
    items, queries = (torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 2))
    present = torch.tensor([[True, True, False, True], [True] * 4])
    assert torch.autograd.gradcheck(lambda x, y: query(y, support(x, present), present), (items, queries))


@pytest.mark.parametrize("joint", [True, False])
def test_batch_norm_sees_support_and_query_together_only_when_joint(joint):
    torch.manual_seed(1)
    method, batch = Matching(Conv4(SHAPE, width=[3, 4]), joint_forward=joint).double(), toy.awkward()
    method(batch)
    means = [m.running_mean.clone() for m in method.backbone.norms]
    other = Matching(Conv4(SHAPE, width=[3, 4])).double()
    other.backbone.load_state_dict(build_state(method))
    for x in [torch.cat([batch.support, batch.query], 1)] if joint else [batch.support, batch.query]:
        other.backbone(x.flatten(0, 1))
    for mean, expected in zip(means, other.backbone.norms, strict=True):
        torch.testing.assert_close(mean, expected.running_mean)


def build_state(method: Matching) -> dict[str, torch.Tensor]:
    """The backbone's weights with fresh running statistics."""
    fresh = Conv4(SHAPE, width=[3, 4]).double().state_dict()
    return {k: fresh[k] if "running" in k else v for k, v in method.backbone.state_dict().items()}


@pytest.mark.parametrize(
    ("options", "least", "steps"),
    [
        ({}, 0.6, 80),
        ({"distance": "squared_euclidean"}, 0.75, 80),
        ({"full_context": True}, 0.6, 80),
        ({"prediction": "closer"}, 0.7, 160),
    ],
)
def test_learns(options, least, steps):
    torch.manual_seed(0)
    method = Matching(MLP((1, toy.SIDE, toy.SIDE), widths=[24]), **options)
    before = toy.accuracy(method)
    toy.train(method, steps)
    after = toy.accuracy(method)
    assert before < 0.45 and after > max(least, before + 0.2), (before, after)


def test_half_precision():
    batch = toy.awkward(dtype=torch.float32)
    for options in ({}, {"full_context": True}, {"prediction": "closer"}):
        torch.manual_seed(1)
        method = Matching(MLP(SHAPE, widths=[7]), **options)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = method(batch)
            state = method.eval().adapt(batch.support, batch.support_labels, 4)
            assert loss.dtype == torch.float32 and method.classify(state, batch.query).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "manhattan"}, "choose one of squared_euclidean, euclidean, cosine, dot"),
        ({"prediction": "softmax"}, "choose one of attention, ravi, closer"),
        ({"prediction": "ravi", "distance": "dot"}, "prediction=ravi is made of cosines"),
        ({"reading": "paper"}, "choose one of concat, added, closer, ravi"),
        ({"full_context": True, "unrolls": 0}, "unrolls=0 must be at least 1"),
        ({"prediction": "ravi", "scale": 10.0}, "takes no scale"),
        ({"prediction": "closer", "learn_scale": True}, "takes no scale"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(PipelineError, match=message):
        build(**options)


def test_without_full_context_there_is_nothing_to_learn_beside_the_backbone():
    assert all(name.startswith("backbone.") for name in build().state_dict())
    with pytest.raises(PipelineError, match="class 1 of 3 has no support image"):
        build().eval().adapt(toy.awkward().support[:1, :2], torch.tensor([[0, 2]]), 3)
