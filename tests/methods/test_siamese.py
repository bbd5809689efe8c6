from __future__ import annotations

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.functional.prototypes import one_hot
from pipeline.methods.siamese import Siamese, class_evidence, contrastive, draw_pairs, every_weighted_l1, weighted_l1
from pipeline.nets.conv4 import Conv4
from pipeline.nets.mlp import MLP
from tests.methods import toy

SHAPE = (1, 6, 6)


def build(**options) -> Siamese:
    torch.manual_seed(1)
    return Siamese(MLP(SHAPE, widths=[9, 7]), **options).double()


def test_every_pair_at_once_by_definition():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, n, 7, generator=generator, dtype=torch.float64) for n in (3, 4))
    alpha, bias = torch.randn(7, generator=generator, dtype=torch.float64), torch.tensor(0.3).double()
    assert (alpha > 0).any() and (alpha < 0).any()
    found = every_weighted_l1(x, y, alpha, bias)
    torch.testing.assert_close(found, weighted_l1(x[:, :, None], y[:, None], alpha, bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shots", ["mean", "max"])
@pytest.mark.parametrize("loss", ["bce", "contrastive"])
def test_classes_by_definition(shots, loss):
    """The mean or largest probability of a class's images, with unequal shots, shuffled, and padding."""
    method, batch = build(shots=shots, loss=loss, margin=1.5).eval(), toy.awkward()
    logits = method.classify(method.adapt(batch.support, batch.support_labels, 4), batch.query)
    for t in range(3):
        support, query = (method.backbone(x[t]) for x in (batch.support, batch.query))
        for j, q in enumerate(query):
            if loss == "bce":
                p = torch.sigmoid((support - q).abs() @ method.alpha + method.bias)
            else:
                p = torch.sigmoid(0.75 - (support - q).norm(dim=1))
            for c in range(4):
                own = p[batch.support_labels[t] == c]
                expected = own.max() if shots == "max" else own.mean()
                torch.testing.assert_close(logits[t, j, c].sigmoid(), expected, rtol=0, atol=1e-10)
        alone, _, queries = toy.one(batch, t)
        found = method.classify(method.adapt(alone.support, alone.support_labels, 4), alone.query)
        torch.testing.assert_close(found[0], logits[t][queries], rtol=0, atol=1e-10)


@pytest.mark.parametrize("shots", ["mean", "max"])
def test_classes_keep_their_order_where_probabilities_round_to_one_or_zero(shots):
    logits = torch.tensor([[[40.0, 41.0, 60.0, 61.0], [-200.0, -199.0, -90.0, -300.0]]])
    assert (logits[0, 0].sigmoid() == 1).all() and (logits[0, 1].exp() < 1e-38).all()
    found = class_evidence(logits, one_hot(torch.tensor([[0, 0, 1, 1]]), 2), shots)
    assert found.isfinite().all() and found.argmax(-1).tolist() == [[1, 1]]
    assert found.softmax(-1).isfinite().all()


def test_pairs_are_half_same_and_never_of_padding_or_one_image():
    torch.manual_seed(0)
    labels = torch.tensor([[0, 0, 1, -1, 1, 2, -1, 0], [3, 2, 1, 1, 1, 0, 2, -1]])
    first, second, same = draw_pairs(labels, 4000)
    assert first.shape == second.shape == same.shape == (2, 4000)
    a, b = labels.gather(1, first), labels.gather(1, second)
    assert torch.equal(a == b, same) and same.sum(1).tolist() == [2000, 2000]
    assert (a >= 0).all() and (b >= 0).all() and (first != second).all()
    for t, (alike, unlike) in enumerate([(3 + 1, 15 - 4), (3 + 1, 21 - 4)]):
        keys = first[t] * 8 + second[t]
        for which, number in ((same[t], alike), (~same[t], unlike)):
            counts = keys[which].unique(return_counts=True)[1]
            assert len(counts) == number and counts.min() > 0.6 * 2000 / number  # uniform over all such pairs


@pytest.mark.parametrize("loss", ["bce", "contrastive"])
def test_loss_by_definition(loss):
    """Pair by pair, with the pairs that the same seed draws, and the penalty of each layer."""
    l2 = [0.1, 0.02] + ([0.003] if loss == "bce" else [])
    method, batch = build(pairs=20, loss=loss, margin=1.5, l2=l2), toy.awkward()
    torch.manual_seed(5)
    found, metrics = method(batch)
    torch.manual_seed(5)
    labels = torch.cat([batch.support_labels, batch.query_labels], 1)
    first, second, same = draw_pairs(labels, 20)
    h = method.backbone(torch.cat([batch.support, batch.query], 1).flatten(0, 1)).unflatten(0, (3, 14))
    losses, right = [], []
    for t in range(3):
        for i, j, s in zip(first[t], second[t], same[t], strict=True):
            if loss == "bce":
                p = torch.sigmoid((h[t, i] - h[t, j]).abs() @ method.alpha + method.bias)
                losses.append(-(p if s else 1 - p).log())
                right.append(bool(p > 0.5) == bool(s))
            else:
                d = (h[t, i] - h[t, j]).norm()
                losses.append(0.5 * d**2 if s else 0.5 * (1.5 - d).clamp(min=0) ** 2)
                right.append(bool(d < 0.75) == bool(s))
    weights = [layer.weight for layer in method.backbone.layers] + ([method.alpha] if loss == "bce" else [])
    penalty = sum(rate * w.square().sum() for rate, w in zip(l2, weights, strict=True))
    assert found.item() == pytest.approx((torch.stack(losses).mean() + penalty).item(), abs=1e-10)
    assert metrics["pair_accuracy"].item() == pytest.approx(sum(right) / len(right))
    found.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


def test_contrastive_loss_of_equal_images_has_a_gradient():
    method, batch = build(loss="contrastive"), toy.awkward()
    method(type(batch)(**{**vars(batch), "support": batch.support * 0, "query": batch.query * 0}))[0].backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())
    distance = torch.tensor([0.5, 3.0, 0.5]).double()
    same = torch.tensor([True, False, False])
    assert contrastive(distance, same, 1.0).item() == pytest.approx((0.5 * 0.25 + 0 + 0.5 * 0.25) / 3)


def test_one_rate_is_of_every_layer():
    one, each = build(l2=0.1), build(l2=[0.1, 0.1, 0.1])
    torch.testing.assert_close(one._penalty(), each._penalty())
    assert build()._penalty() == 0.0
    conv = Siamese(Conv4(SHAPE, width=[3, 4]), l2=0.1)
    assert [p.shape[0] for p in conv._layers()] == [3, 4, 4]  # convolutions and alpha, no gain or bias of batch-norm


@pytest.mark.parametrize("options", [{}, {"loss": "contrastive", "shots": "max", "margin": 4.0}])
def test_learns(options):
    torch.manual_seed(0)
    method = Siamese(MLP((1, toy.SIDE, toy.SIDE), widths=[24]), **options)
    before = toy.accuracy(method)
    toy.train(method, steps=120)
    after = toy.accuracy(method)
    assert after > max(0.6, before + 0.2), (before, after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 5}, "pairs=5 must be an even number"),
        ({"loss": "hinge"}, "choose one of bce, contrastive"),
        ({"shots": "sum"}, "choose one of mean, max"),
        ({"l2": [0.1]}, "one number or 3, one a layer"),
        ({"l2": -1.0}, "none below 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(PipelineError, match=message):
        build(**options)
