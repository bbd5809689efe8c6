from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.batch import Episodes
from pipeline.errors import PipelineError
from pipeline.methods.relation import Relation, class_maps, relation_loss
from pipeline.model import build_model
from pipeline.nets.mlp import MLP
from pipeline.nets.relation_encoder import RelationEncoder
from pipeline.nets.relation_module import RelationModule

WAY = 3
LABELS = torch.tensor([[2, 0, 1, 1, 0], [0, 1, 2, 0, 0]])
QUERY_LABELS = torch.tensor([[0, 1, 2, -1], [1, 1, 0, 2]])
FORMS = ["loop", "vmap"]


def batch(dtype=torch.float64, size=24, labels=LABELS) -> Episodes:
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(2, 5, 1, size, size, generator=generator, dtype=dtype)
    query = torch.randn(2, 4, 1, size, size, generator=generator, dtype=dtype)
    return Episodes(support, labels, query, QUERY_LABELS, torch.arange(WAY).expand(2, WAY), WAY)


def build(size=24, dtype=torch.float64, **options) -> Relation:
    torch.manual_seed(1)
    method = Relation(RelationEncoder((1, size, size), width=4), width=5, hidden=3, **options).to(dtype)
    for parameter in method.relation.parameters():  # the official start is so small that every score is the same
        nn.init.normal_(parameter)
    return method


def normalise(x, norm, training=True):
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    else:
        mean, var = norm.running_mean, norm.running_var
    shape = (1, -1, 1, 1)
    x = (x - mean.view(shape)) / (var.view(shape) + norm.eps).sqrt()
    return x * norm.weight.view(shape) + norm.bias.view(shape)


def by_definition(method: Relation, e: Episodes, batch_statistics=True) -> torch.Tensor:
    """Relation scores, pair by pair as the paper concatenates them, task by task."""

    def encode(x):
        for i, (conv, norm) in enumerate(zip(method.backbone.convs, method.backbone.norms, strict=True)):
            x = F.relu(normalise(F.conv2d(x, conv.weight, padding=int(i > 1)), norm, batch_statistics))
            x = F.max_pool2d(x, 2) if i < 2 else x
        return x

    g, scores = method.relation, []
    for t in range(len(e.support)):
        support, query, labels = encode(e.support[t]), encode(e.query[t]), e.support_labels[t]
        classes = [support[labels == c].sum(0) for c in range(WAY)]
        if method.mean:
            classes = [support[labels == c].mean(0) for c in range(WAY)]
        x = torch.stack([torch.cat([c, q]) for q in query for c in classes])
        for conv, norm in zip(g.convs, g.norms, strict=True):
            x = F.conv2d(x, conv.weight, padding=g.padding)
            x = F.max_pool2d(F.relu(normalise(x, norm, batch_statistics)), 2)
        x = F.relu(x.flatten(1) @ g.fc1.weight.T + g.fc1.bias) @ g.fc2.weight.T + g.fc2.bias
        scores.append(x.sigmoid().view(len(query), WAY))
    return torch.stack(scores)


@pytest.mark.parametrize("tasks", FORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("size", "padding"), [(24, None), (46, None), (46, 1)])
@pytest.mark.parametrize("shots", ["sum", "mean"])
def test_by_definition(tasks, training, size, padding, shots):
    method, e = build(size, padding=padding, shots=shots, tasks=tasks).train(training), batch(size=size)
    assert method.relation.padding == (1 if size == 24 or padding else 0)
    expected = by_definition(method, e)
    logits = method.classify(method.adapt(e.support, LABELS, WAY), e.query)
    torch.testing.assert_close(logits.sigmoid(), expected, rtol=0, atol=1e-10)
    wanted = (QUERY_LABELS.unsqueeze(-1) == torch.arange(WAY)).double()
    asked = QUERY_LABELS >= 0
    loss, metrics = method(e)
    assert loss.item() == pytest.approx((expected - wanted)[asked].square().mean().item(), abs=1e-12)
    right = (expected.argmax(-1) == QUERY_LABELS)[asked].double().mean()
    assert metrics["accuracy"].item() == pytest.approx(right.item())


def test_running_statistics():
    method, e = build(transductive=False), batch()
    for _ in range(3):
        method(e)
    assert method.embeds_once and float(method.relation.norms[0].running_mean.abs().max()) > 0
    method.eval()
    state = method.adapt(e.support, LABELS)
    logits = method.classify(state, e.query)
    torch.testing.assert_close(logits.sigmoid(), by_definition(method, e, False), rtol=0, atol=1e-10)
    torch.testing.assert_close(method.classify(state, e.query[:, :1]), logits[:, :1], rtol=0, atol=1e-10)


def test_transductive_answers_depend_on_the_other_queries_and_not_on_other_tasks():
    method, e = build().eval(), batch()
    state = method.adapt(e.support, LABELS)
    logits = method.classify(state, e.query)
    assert (method.classify(state, e.query[:, :2]) - logits[:, :2]).abs().max() > 1e-3
    alone = method.classify(method.adapt(e.support[1:], LABELS[1:], WAY), e.query[1:])
    torch.testing.assert_close(alone, logits[1:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{"tasks": "loop"}, {"tasks": "vmap"}, {"transductive": False, "shots": "mean"}])
def test_gradient_is_the_central_finite_difference(options):
    method, e = build(**options), batch()
    method(e)[0].backward()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in method.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += step * direction
                losses.append(method(e)[0].item())
                parameter -= step * direction
        difference = (losses[0] - losses[1]) / 2e-6
        assert (parameter.grad * direction).sum().item() == pytest.approx(difference, rel=1e-5, abs=1e-9), name


def test_padding_counts_nowhere():
    generator = torch.Generator().manual_seed(3)
    maps = torch.randn(1, 4, 2, 3, 3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[1, -1, 0, 1]])
    for mean, share in ((False, 1), (True, 2)):
        found = class_maps(maps, labels, 2, mean)
        torch.testing.assert_close(found[0, 1], (maps[0, 0] + maps[0, 3]) / share)
        assert torch.equal(found[0, 0], maps[0, 2])
    logits = torch.randn(1, 4, 2, generator=generator, dtype=torch.float64)
    few = relation_loss(logits[:, [0, 2, 3]], labels[:, [0, 2, 3]])
    assert relation_loss(logits, labels).item() == pytest.approx(few.item(), abs=1e-15)


def test_extend():
    method, e = build(transductive=False).eval(), batch()
    state = method.adapt(e.support, LABELS)
    more, labels = torch.randn(2, 3, 1, 24, 24).double(), torch.tensor([[3, 4, 3], [4, 4, 3]])
    extended = method.extend(state, more, labels)
    assert torch.equal(extended["maps"][:, :WAY], state["maps"])
    at_once = method.adapt(torch.cat([e.support, more], 1), torch.cat([LABELS, labels], 1))
    torch.testing.assert_close(extended["maps"], at_once["maps"], rtol=0, atol=1e-10)
    known, all_classes = method.classify(state, e.query), method.classify(extended, e.query)
    torch.testing.assert_close(known, all_classes[..., :WAY], rtol=0, atol=1e-10)
    with pytest.raises(PipelineError, match="numbered from 3"):
        method.extend(state, more, labels - 1)
    assert build().eval().extend(state, more, labels) is None


def test_official_start():
    torch.manual_seed(0)
    method = Relation(RelationEncoder((1, 28, 28)))
    assert float(method.backbone.convs[1].weight.detach().std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert float(method.relation.convs[0].weight.detach().std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert float(method.relation.fc1.weight.detach().std()) == pytest.approx(0.01, rel=0.2)
    assert method.relation.fc1.bias.eq(1).all() and method.relation.fc2.bias.eq(1).all()
    assert method.map_shape == (64, 5, 5) and method.relation.fc1.in_features == 64


@pytest.mark.parametrize(("size", "maps", "padding", "hidden_inputs"), [(84, 19, 0, 64 * 9), (28, 5, 1, 64)])
def test_published_shapes(size, maps, padding, hidden_inputs):
    encoder = RelationEncoder((3, size, size))
    assert encoder.map_shape == (64, maps, maps) and encoder(torch.rand(2, 3, size, size)).shape[1] == 64 * maps * maps
    module = RelationModule(encoder.map_shape)
    assert module.padding == padding and module.fc1.in_features == hidden_inputs


def test_learns():
    torch.manual_seed(0)
    method = Relation(RelationEncoder((1, 24, 24), width=16), width=16)
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    patterns = (torch.rand(30, 1, 24, 24) > 0.7).float()

    def episodes() -> Episodes:
        classes = torch.stack([torch.randperm(30)[:WAY] for _ in range(4)])
        labels = torch.arange(WAY).repeat(4, 4)
        images = patterns[classes.gather(1, labels)] + 0.3 * torch.randn(4, 4 * WAY, 1, 24, 24)
        return Episodes(images[:, :WAY], labels[:, :WAY], images[:, WAY:], labels[:, WAY:], classes, WAY)

    found = []
    for _ in range(60):
        loss, metrics = method(episodes())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(metrics["accuracy"].item())
    assert sum(found[:5]) / 5 < 0.6 < 0.85 < sum(found[-5:]) / 5


def test_half_precision():
    method, e = build(dtype=torch.float32), batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert method(e)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ({"name": "mlp"}, {}, "no map_shape: choose backbone=relation_encoder"),
        ({"name": "relation_encoder"}, {"padding": 0}, "leaves nothing of maps of 5x5 with padding=0"),
        ({"name": "relation_encoder"}, {"shots": "max"}, "choose one of sum, mean"),
        ({"name": "relation_encoder"}, {"tasks": "scan"}, "choose one of auto, loop, vmap"),
        ({"name": "relation_encoder", "init": "zeros"}, {}, "choose one of official, torch"),
    ],
)
def test_refusals_are_one_line(backbone, options, message):
    spec = {"method": {"name": "relation", **options}, "backbone": backbone, "input": {"shape": [1, 28, 28]}}
    with pytest.raises(PipelineError) as caught:
        build_model(spec)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_images_that_are_too_small():
    with pytest.raises(PipelineError, match="at least 10x10"):
        RelationEncoder((1, 9, 9))
    assert RelationEncoder((1, 10, 10)).map_shape == (64, 1, 1)
    with pytest.raises(PipelineError, match="no map_shape"):
        Relation(MLP((1, 8, 8)))
    with pytest.raises(PipelineError, match="with padding=1: give larger images or a backbone with larger maps$"):
        Relation(RelationEncoder((1, 10, 10)))
