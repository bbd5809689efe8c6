from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipeline.batch import Episodes
from pipeline.errors import PipelineError
from pipeline.functional.sequences import sequence_order
from pipeline.methods.snail import Snail
from pipeline.model import build_model
from pipeline.nets.conv4 import Conv4
from pipeline.nets.mlp import MLP
from pipeline.nets.snail_blocks import SnailNetwork

WAY = 3
LABELS = torch.tensor([[2, 0, 1, 1, 0], [0, 1, 2, 0, 0]])
QUERY_LABELS = torch.tensor([[0, 1, 2, -1], [1, 1, 0, 2]])
SIZES = {"filters": 4, "attention": ((5, 3), (6, 4), (4, 2))}


def batch(dtype=torch.float64) -> Episodes:
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(2, 5, 1, 8, 8, generator=generator, dtype=dtype)
    query = torch.randn(2, 4, 1, 8, 8, generator=generator, dtype=dtype)
    return Episodes(support, LABELS, query, QUERY_LABELS, torch.arange(WAY).expand(2, WAY), WAY)


def build(backbone=None, dtype=torch.float64, **options) -> Snail:
    torch.manual_seed(1)
    return Snail(backbone or MLP((1, 8, 8), widths=[6]), WAY, 2, **SIZES, **options).to(dtype)


def by_definition(method: Snail, support, labels, query, order) -> torch.Tensor:
    """Answers [Q, way] of one task, every query at the end of a sequence of its own, position by position."""
    answers = []
    for q in query:
        items = [torch.cat([support[i], nn.functional.one_hot(labels[i], WAY).double()]) for i in order]
        x = torch.stack([*items, torch.cat([q, torch.zeros(WAY).double()])])
        for block in method.network.blocks:
            rows = []
            if hasattr(block, "units"):
                for t in range(len(x)):
                    earlier = x[t - block.dilation] if t >= block.dilation else torch.zeros_like(x[t])
                    f, g = (block.units.weight @ torch.cat([earlier, x[t]]) + block.units.bias).chunk(2)
                    rows.append(f.tanh() * g.sigmoid())
            else:
                queries, keys, values = block.query(x), block.key(x), block.value(x)
                scores = torch.tensor(
                    [
                        [-math.inf if j > i else (queries[i] @ keys[j]).item() for j in range(len(x))]
                        for i in range(len(x))
                    ]
                ).double() / math.sqrt(keys.shape[1])
                weights = scores.softmax(0 if method.repo_softmax else 1)
                rows = list(weights @ values)
            x = torch.cat([x, torch.stack(rows)], dim=1)
        answers.append(method.network.linear(x[-1]))
    return torch.stack(answers)


def evaluation_order(labels: torch.Tensor) -> torch.Tensor:
    return sequence_order(labels, shuffle=False, padding_first=True)


@pytest.mark.parametrize("repo_softmax", [False, True])
def test_by_definition(repo_softmax):
    method, e = build(repo_softmax=repo_softmax).eval(), batch()
    logits = method.classify(method.adapt(e.support, LABELS), e.query)
    for t in range(2):
        support, query = method.backbone(e.support[t]), method.backbone(e.query[t])
        expected = by_definition(method, support, LABELS[t], query, evaluation_order(LABELS)[t])
        torch.testing.assert_close(logits[t], expected, rtol=0, atol=1e-10)
        alone = method.classify(method.adapt(e.support[t : t + 1], LABELS[t : t + 1], WAY), e.query[t : t + 1])
        torch.testing.assert_close(alone[0], logits[t], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shot", [1, 2, 7])
def test_remembered_support_is_the_whole_sequence(shot):
    """Answers and gradients, of sequences shorter and longer than the largest dilation."""
    torch.manual_seed(2)
    network = SnailNetwork(9, WAY * shot + 1, WAY, SIZES["attention"], SIZES["filters"]).double()
    support, items = torch.randn(2, WAY * shot, 9).double(), torch.randn(2, 4, 9).double()
    found = []
    for whole in (True, False):
        network.zero_grad()
        inputs = [support.clone().requires_grad_(), items.clone().requires_grad_()]
        if whole:
            sequences = torch.cat([inputs[0].unsqueeze(1).expand(-1, 4, -1, -1), inputs[1].unsqueeze(2)], dim=2)
            answers = network(sequences.flatten(0, 1))[:, -1].unflatten(0, (2, 4))
        else:
            answers = network.last(inputs[1], network.remember(inputs[0]))
        answers.square().sum().backward()
        found.append([answers, *(x.grad for x in inputs), *(p.grad.clone() for p in network.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_training_shuffles_and_evaluation_does_not():
    method, e = build(), batch()
    answers = [method.classify(method.adapt(e.support, LABELS, WAY), e.query) for _ in range(2)]
    assert (answers[0] - answers[1]).abs().max() > 1e-6
    torch.manual_seed(3)
    again = method.classify(method.adapt(e.support, LABELS, WAY), e.query)
    torch.manual_seed(3)
    assert torch.equal(again, method.classify(method.adapt(e.support, LABELS, WAY), e.query))
    method.eval()
    answers = [method.classify(method.adapt(e.support, LABELS, WAY), e.query) for _ in range(2)]
    assert torch.equal(*answers)


def test_order():
    labels = torch.tensor([[0, 1, 2, 3, 4], [3, 1, 4, 0, 2], [0, 0, 1, 1, -1], [0, 0, -1, 1, 1]])
    order = sequence_order(labels, shuffle=False)
    assert torch.equal(labels[0][order[0]], labels[1][order[1]])  # one image a class: whatever order they came in
    assert labels[0][order[0]].tolist() != [0, 1, 2, 3, 4]
    assert order[2, -1] == 4 and order[3, -1] == 2  # padding last
    assert torch.equal(
        order[2, :4], sequence_order(labels[2:3, :4], shuffle=False)[0]
    )  # and it changes no other's place
    first = sequence_order(labels, shuffle=False, padding_first=True)
    assert torch.equal(first[2, 1:], order[2, :4]) and first[2, 0] == 4
    torch.manual_seed(0)
    many = torch.stack([sequence_order(labels, shuffle=True) for _ in range(2000)])
    assert many.sort(-1).values.eq(torch.arange(5)).all() and many[:, 2:, -1].eq(torch.tensor([4, 2])).all()
    frequency = nn.functional.one_hot(many[:, 0], 5).double().mean(0)
    assert (frequency - 0.2).abs().max() < 0.05
    lengths = [sequence_order(torch.zeros(1, n).long(), shuffle=False)[0] for n in (100, 37)]
    assert torch.equal(lengths[0][lengths[0] < 37], lengths[1])  # more images leave the places of the others


def test_padding_counts_nowhere():
    """A task with padding in support and queries is the task without it."""
    method, e = build().eval(), batch()
    support, labels = e.support[:1], LABELS[:1]
    padded = torch.cat([support[:, :2], torch.randn(1, 2, 1, 8, 8).double(), support[:, 2:]], dim=1)
    padded_labels = torch.cat([labels[:, :2], torch.full((1, 2), -1), labels[:, 2:]], dim=1)
    answers = [
        method.classify(method.adapt(*task), e.query[:1]) for task in ((support, labels), (padded, padded_labels))
    ]
    torch.testing.assert_close(*answers, rtol=0, atol=1e-12)
    whole = build(repo_softmax=True).eval()
    answers = [whole.classify(whole.adapt(*task), e.query[:1]) for task in ((support, labels), (padded, padded_labels))]
    torch.testing.assert_close(*answers, rtol=0, atol=1e-12)
    few = Episodes(support, labels, e.query[:1, :3], QUERY_LABELS[:1, :3], e.classes[:1], WAY)
    all_queries = Episodes(padded, padded_labels, e.query[:1], QUERY_LABELS[:1], e.classes[:1], WAY)
    assert method(few)[0].item() == pytest.approx(method(all_queries)[0].item(), abs=1e-12)


@pytest.mark.parametrize("repo_softmax", [False, True])
def test_gradient_is_the_central_finite_difference(repo_softmax):
    method, e = build(Conv4((1, 8, 8), width=[3, 4]), repo_softmax=repo_softmax), batch()

    def loss() -> torch.Tensor:
        torch.manual_seed(4)  # the order of the support
        return method(e)[0]

    loss().backward()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in method.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += step * direction
                losses.append(loss().item())
                parameter -= step * direction
        difference = (losses[0] - losses[1]) / 2e-6
        assert (parameter.grad * direction).sum().item() == pytest.approx(difference, rel=1e-5, abs=1e-9), name


def test_joint_embedding_in_training():
    method, e = build(Conv4((1, 8, 8), width=[3, 4])), batch()
    torch.manual_seed(5)
    loss = method(e)[0]
    together = method.backbone(torch.cat([e.support, e.query], 1).flatten(0, 1)).unflatten(0, (2, 9))
    method.backbone = nn.Flatten()  # embeddings as images
    torch.manual_seed(5)
    state = method.adapt(together[:, :5, :, None, None], LABELS, WAY)
    logits = method.classify(state, together[:, 5:, :, None, None])
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), QUERY_LABELS.flatten(), ignore_index=-1)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)


def test_published_sizes():
    method = Snail(Conv4((1, 28, 28)), 5, 1)
    # 64 + 5 and 32; twice 3 dense blocks of 128 channels (sequences of 6), 128 and 256
    assert method.network.linear.in_features == 64 + 5 + 32 + 3 * 128 + 128 + 3 * 128 + 256
    assert [b.dilation for b in method.network.blocks if hasattr(b, "dilation")] == [2, 4, 8] * 2
    assert [b.key.out_features for b in method.network.blocks if hasattr(b, "key")] == [64, 256, 512]


@pytest.mark.parametrize("repo_softmax", [False, True])
def test_other_shots_than_in_training(repo_softmax):
    method = build(repo_softmax=repo_softmax).eval()
    with torch.inference_mode():
        for labels in ([[0, 1, 2]], [[0, 1, 2] * 6]):
            support = torch.randn(1, len(labels[0]), 1, 8, 8).double()
            state = method.adapt(support, torch.tensor(labels), WAY)
            assert all(len(value) == 1 for value in state.values())
            assert method.classify(state, support).isfinite().all()


def test_learns():
    torch.manual_seed(0)
    method = Snail(MLP((8, 1, 1), widths=[16]), WAY, 1, filters=8, attention=((8, 8), (8, 8)))
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    found = []
    for _ in range(100):
        centres, labels = 2 * torch.randn(32, WAY, 8), torch.arange(WAY).repeat(32, 3)
        images = (centres.repeat(1, 3, 1) + 0.2 * torch.randn(32, 3 * WAY, 8))[..., None, None]
        e = Episodes(images[:, :WAY], labels[:, :WAY], images[:, WAY:], labels[:, WAY:], labels, WAY)
        loss, metrics = method(e)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(metrics["accuracy"].item())
    assert sum(found[:5]) / 5 < 0.6 < 0.9 < sum(found[-5:]) / 5


def test_half_precision():
    method, e = build(Conv4((1, 8, 8), width=[3, 4]), torch.float32), batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method(e)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": []}, "give [key size, value size]"),
        ({"attention": [[4, 3, 2]]}, "give [key size, value size]"),
        ({"heads": 2}, "its options are filters, attention, repo_softmax"),
    ],
)
def test_refusals_are_one_line(change, message):
    spec = {"backbone": {"name": "mlp"}, "input": {"shape": [1, 4, 4]}, "way": 3, "shot": 1}
    with pytest.raises(PipelineError) as caught:
        build_model({**spec, "method": {"name": "snail", **change}})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_another_way_is_refused():
    with pytest.raises(PipelineError, match="built for 3 classes"):
        build().eval().adapt(batch().support, LABELS, 4)
