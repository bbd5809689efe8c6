from __future__ import annotations

import pytest
import torch

from pipeline.batch import Images
from pipeline.errors import PipelineError
from pipeline.methods.proxy_nca import ProxyNCA
from pipeline.nets.mlp import MLP
from tests.methods import toy

SHAPE = (1, 6, 6)


def build(classes: int = 5, **options) -> ProxyNCA:
    torch.manual_seed(1)
    return ProxyNCA(MLP(SHAPE, widths=[7]), classes, **options).double()


@pytest.mark.parametrize("options", [{}, {"form": "softmax"}, {"form": "softmax", "smoothing": 0.1}])
@pytest.mark.parametrize("scales", [(3.0, 3.0), (1.0, 8.0)])
def test_loss_by_definition(options, scales):
    method = build(scale_x=scales[0], scale_p=scales[1], embedding_dim=4, **options)
    images, labels = toy.awkward().support[0], torch.tensor([0, 1, 4, 4, 2, 3, 0, 1])
    x = method.embedding(method.backbone(images))
    losses = []
    for e, y in zip(x, labels, strict=True):
        d = torch.stack([(scales[0] * e / e.norm() - scales[1] * p / p.norm()).square().sum() for p in method.proxies])
        rest = torch.arange(5) != y
        if not options:
            losses.append(d[y] + (-d[rest]).exp().sum().log())
            continue
        smoothing = options.get("smoothing", 0.0)
        log_p = (-d).log_softmax(0)
        losses.append(-(1 - smoothing) * log_p[y] - smoothing / 4 * log_p[rest].sum())
    assert method(Images(images, labels))[0].item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-9)


def test_new_classes_by_definition_and_extend():
    method, batch = build().eval(), toy.awkward()
    state = method.adapt(batch.support, batch.support_labels, 4)
    logits = method.classify(state, batch.query)
    for t in range(3):
        support, query = (method.backbone(x[t]) for x in (batch.support, batch.query))
        for c in range(4):
            own = support[batch.support_labels[t] == c]
            mean = (own / own.norm(dim=1, keepdim=True)).mean(0)
            expected = -(3 * query / query.norm(dim=1, keepdim=True) - 3 * mean / mean.norm()).square().sum(1)
            torch.testing.assert_close(logits[t, :, c], expected, rtol=0, atol=1e-10)
    method, support, query = method.float(), batch.support.float(), batch.query.float()
    state = method.adapt(support, batch.support_labels, 4)
    extended = method.extend(state, query[:, :2], torch.tensor([[4, 5]] * 3))
    assert torch.equal(method.classify(extended, query)[..., :4], method.classify(state, query))
    with pytest.raises(PipelineError, match="numbered from 4"):
        method.extend(state, query[:, :2], torch.tensor([[3, 4]] * 3))


def test_proxies_have_a_learning_rate_of_their_own():
    method = build(proxy_lr_scale=40.0, embedding_dim=3)
    groups = list(method.parameter_groups())
    assert [g["lr_scale"] for g in groups] == [1.0, 40.0] and groups[1]["params"] == [method.proxies]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in method.parameters())
    assert method.proxies.shape == (5, 3)
    assert build(5000).proxies.std().item() == pytest.approx(1 / 8, rel=0.02)


@pytest.mark.parametrize("options", [{}, {"form": "softmax", "smoothing": 0.1}])
def test_learns(options):
    torch.manual_seed(0)
    method = ProxyNCA(MLP((1, toy.SIDE, toy.SIDE), widths=[24]), toy.CLASSES, embedding_dim=12, **options)
    before = toy.accuracy(method)
    toy.train(method, steps=150)
    after = toy.accuracy(method)
    assert after > max(0.6, before + 0.15), (before, after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "loose"}, "choose one of strict, softmax"),
        ({"smoothing": 0.1}, "0 unless form=softmax"),
        ({"form": "softmax", "smoothing": 1.0}, "must be in"),
        ({"classes": 1}, "at least two training classes"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(PipelineError, match=message):
        build(**options)
