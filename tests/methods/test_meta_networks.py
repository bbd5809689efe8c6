from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.batch import Episodes
from pipeline.errors import PipelineError
from pipeline.functional.sequences import sequence_order
from pipeline.methods.meta_networks import MetaNetworks, contrastive_loss, in_steps, log_and_sign
from pipeline.model import build_model
from pipeline.nets.conv4 import Conv4
from pipeline.nets.mlp import MLP

WAY = 3
LABELS = torch.tensor([[2, 0, 1, 1, 0], [0, 1, 2, 0, 0]])
QUERY_LABELS = torch.tensor([[0, 1, 2, -1], [1, 1, 0, 2]])
BACKBONES = {
    "conv": lambda: Conv4((1, 10, 10), width=[3]),  # maps of 5x5, then 3x3 and 2x2
    "mlp": lambda: MLP((1, 10, 10), widths=[9]),
}


def batch(dtype=torch.float64, seed=0) -> Episodes:
    generator = torch.Generator().manual_seed(seed)
    support = torch.randn(2, 5, 1, 10, 10, generator=generator, dtype=dtype)
    query = torch.randn(2, 4, 1, 10, 10, generator=generator, dtype=dtype)
    return Episodes(support, LABELS, query, QUERY_LABELS, torch.arange(WAY).expand(2, WAY), WAY)


def build(backbone="conv", dtype=torch.float64, **options) -> MetaNetworks:
    torch.manual_seed(1)
    defaults = {"filters": 2, "units": 4, "hidden": 4}
    return MetaNetworks(BACKBONES[backbone](), WAY, **{**defaults, **options}).to(dtype)


def preprocess(x: torch.Tensor, p: float) -> torch.Tensor:
    pairs = [
        (math.log(abs(v)) / p, math.copysign(1, v)) if abs(v) >= math.exp(-p) else (-1.0, math.exp(p) * v)
        for v in x.flatten().tolist()
    ]
    return torch.tensor(pairs, dtype=torch.float64)


def run(layers, x, slow, fast=None):
    """Representation and answers of one image's map [C, H, W] for weights as the modules have them."""
    x = x[None]
    convolutions = len(layers.convs)

    def both(apply, index, rectify):
        parts = [apply(weights[index]) for weights in ((slow,) if fast is None else (slow, fast))]
        return sum(F.relu(part) if rectify else part for part in parts)

    for index in range(convolutions):
        x = both(lambda w, x=x: F.conv2d(x, w, padding=1), index, True)
        x = F.max_pool2d(x, 2, ceil_mode=True)
    x = x.flatten(1)
    representation = both(lambda w: x @ w.T, convolutions, False)[0]
    if len(slow if fast is None else fast) == convolutions + 1:
        return representation, None
    h = both(lambda w: x @ w.T, convolutions, True)
    return representation, both(lambda w: h @ w.T, convolutions + 1, False)[0]


def lstm_by_hand(lstm: torch.nn.LSTM, inputs: torch.Tensor) -> torch.Tensor:
    """The last hidden state of inputs [steps, N, 2]."""
    h = c = torch.zeros(inputs.shape[1], lstm.hidden_size, dtype=torch.float64)
    for x in inputs:
        z = x @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + h @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
        i, f, g, o = z.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return h


def weights_of(layers) -> list[torch.Tensor]:
    modules = [*layers.convs, layers.hidden, *([layers.output] if layers.output is not None else [])]
    return [m.weight.detach().clone().requires_grad_() for m in modules]


def by_definition(method: MetaNetworks, support, labels, query) -> torch.Tensor:
    """Logits [Q, way] of one task in evaluation: image by image and query by query (algorithm 1)."""
    order = sequence_order(labels[None], shuffle=False)[0]
    support, labels = support[order], labels[order]
    c = method.convolutions
    kinds = ["convolution"] * c + ["linear"] * 2
    maps = method.backbone(support).unflatten(-1, method.map_shape).detach()
    key_maps = method.key_backbone(support).unflatten(-1, method.map_shape).detach()

    slow = weights_of(method.key_layers)
    if method.contrastive:
        r = torch.stack([run(method.key_layers, m, slow)[0] for m in key_maps])
        gradients = []
        for i in range(len(r)):  # what changes with the image's own part in its network
            parts = torch.stack([r[j] if j == i else r[j].detach() for j in range(len(r))])
            total = 0.0
            for a in range(len(r)):
                for b in range(len(r)):
                    if a != b:
                        d = (parts[a] - parts[b]).norm()
                        loss = d**2 if labels[a] == labels[b] else (method.margin - d).clamp(min=0) ** 2
                        total = total + 0.5 * loss / (len(r) - 1)
            gradients.append(torch.autograd.grad(total, slow, retain_graph=True))
    else:
        losses = [
            F.cross_entropy(run(method.key_layers, m, slow)[1][None], y[None])
            for m, y in zip(key_maps, labels, strict=True)
        ]
        gradients = [torch.autograd.grad(loss, slow) for loss in losses]
    size = -(-len(labels) // method.steps)
    groups = [gradients[i : i + size] for i in range(0, len(labels), size)]
    task = []
    for index in range(c + 1):
        means = [torch.stack([g[index] for g in group]).mean(0) for group in groups]
        read = lstm_by_hand(method.lstm[kinds[index]], torch.stack([preprocess(m, method.precision) for m in means]))
        task.append(method.lstm_output[kinds[index]](read).view(means[0].shape))

    own = weights_of(method.base)
    memory, keys = [], []
    for m, k, y in zip(maps, key_maps, labels, strict=True):
        gradient = torch.autograd.grad(F.cross_entropy(run(method.base, m, own)[1][None], y[None]), own)
        memory.append(
            [method.small[kinds[i]](preprocess(g, method.precision)).view(g.shape) for i, g in enumerate(gradient)]
        )
        keys.append(run(method.key_layers, k, slow, task)[0])
    answers = []
    for x in query:
        key = run(method.key_layers, method.key_backbone(x[None])[0].view(method.map_shape), slow, task)[0]
        weights = torch.stack([key @ k / ((key.norm() + 1e-8) * (k.norm() + 1e-8)) for k in keys]).softmax(0)
        fast = [sum(w * images[i] for w, images in zip(weights, memory, strict=True)) for i in range(c + 2)]
        answers.append(run(method.base, method.backbone(x[None])[0].view(method.map_shape), own, fast)[1])
    return torch.stack(answers)


@pytest.mark.parametrize(
    "options",
    [{}, {"steps": 2}, {"convolutions": 0}, {"representation_loss": "contrastive", "margin": 3.0}, {"hidden": None}],
    ids=str,
)
@pytest.mark.parametrize("backbone", ["conv", "mlp"])
def test_by_definition(backbone, options):
    method, e = build(backbone, **options), batch()
    assert method.convolutions == (2 if backbone == "conv" and options.get("convolutions") is None else 0)
    for _ in range(3):
        method(e)
    method.eval()
    with torch.no_grad():
        logits = method.classify(method.adapt(e.support, LABELS), e.query)
    for t in range(2):
        expected = by_definition(method, e.support[t], LABELS[t], e.query[t])
        torch.testing.assert_close(logits[t], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"representation_loss": "contrastive", "margin": 3.0}], ids=str)
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("backbone", ["conv", "mlp"])
def test_meta_gradient_is_the_central_finite_difference(backbone, first_order, options, monkeypatch):
    method, e = build(backbone, first_order=first_order, **options), batch()

    def loss() -> torch.Tensor:
        torch.manual_seed(4)  # the order of the support
        return method(e)[0]

    loss().backward()
    if first_order:  # the gradients that the networks read are constants
        read, kept = method._gradients, {}

        def constant(layers, *arguments):
            if layers not in kept:
                kept[layers] = read(layers, *arguments)
            return kept[layers]

        monkeypatch.setattr(method, "_gradients", constant)
        loss()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            assert first_order and name == "key_layers.output.weight"
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (3e-7, -3e-7):
            with torch.no_grad():
                parameter += step * direction
            losses.append(loss().item())
            with torch.no_grad():
                parameter -= step * direction
        difference = (losses[0] - losses[1]) / 6e-7
        assert (parameter.grad * direction).sum().item() == pytest.approx(difference, rel=1e-5, abs=1e-8), name


def test_first_and_second_order_differ():
    found = []
    for first_order in (True, False):
        method = build(first_order=first_order)
        torch.manual_seed(4)
        method(batch())[0].backward()
        found.append(method.base.hidden.weight.grad)
    assert (found[0] - found[1]).abs().max() > 1e-4


@pytest.mark.parametrize("options", [{}, {"steps": 2}, {"representation_loss": "contrastive"}], ids=str)
def test_padding_counts_nowhere(options):
    method, e = build(**options).eval(), batch()
    padded = torch.cat([e.support[:, :2], torch.randn(2, 2, 1, 10, 10).double(), e.support[:, 2:]], dim=1)
    labels = torch.cat([LABELS[:, :2], torch.full((2, 2), -1), LABELS[:, 2:]], dim=1)
    answers = [method.classify(method.adapt(*task), e.query) for task in ((e.support, LABELS), (padded, labels))]
    torch.testing.assert_close(*answers, rtol=0, atol=1e-10)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
def test_evaluation_has_no_graph_and_a_task_does_not_see_the_others(guard, frozen, first_order):
    method, e = build(first_order=first_order).eval().requires_grad_(not frozen), batch()
    with guard():
        support = e.support.clone()
        state = method.adapt(support, LABELS)
        logits = method.classify(state, e.query)
        alone = method.classify(method.adapt(support[1:], LABELS[1:]), e.query[1:, :2])
    assert all(len(value) == 2 and not value.requires_grad for value in state.values())
    torch.testing.assert_close(alone, logits[1:, :2], rtol=0, atol=1e-10)
    assert all(p.grad is None for p in method.parameters())


def test_the_order_is_random_in_training_only():
    method, e = build(), batch()
    method.eval()
    assert torch.equal(*(method.adapt(e.support, LABELS)["task.0"] for _ in range(2)))
    shuffled = method.train().adapt(e.support, LABELS, WAY)["task.0"]
    assert (shuffled - method.adapt(e.support, LABELS, WAY)["task.0"]).abs().max() > 1e-8


def test_log_and_sign():
    x = torch.tensor([0.0, 1.0, -1.0, 0.5, -2e-3, math.exp(-7), -9e-4, 1e-6, 20.0], dtype=torch.float64)
    torch.testing.assert_close(log_and_sign(x, 7.0), preprocess(x, 7.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_and_sign(x, 10.0), preprocess(x, 10.0), rtol=0, atol=1e-12)
    x.requires_grad_()
    log_and_sign(x, 7.0).sum().backward()
    assert x.grad.isfinite().all()


def test_in_steps():
    gradients = torch.arange(1.0, 8.0).view(1, 7, 1).repeat(2, 1, 1)
    present = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    means, last = in_steps(gradients, present, 3)
    assert means[..., 0].tolist() == [[2, 5, 7], [1.5, 3.5, 0]] and last.tolist() == [2, 1]
    means, last = in_steps(gradients, present, 10)
    assert means[0, :, 0].tolist() == list(range(1, 8)) and last.tolist() == [6, 3]


def test_contrastive_loss():
    x = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [9.0, 9.0]]], dtype=torch.float64)
    # distances 5, 1 and sqrt(18): each pair is met from both sides, and every image has two others
    expected = (0.5 * (5**2 + (2 - 1) ** 2)) * 2 / 2
    assert contrastive_loss(x, torch.tensor([[0, 0, 1, -1]]), 2.0).item() == pytest.approx(expected)


@pytest.mark.parametrize("first_order", [True, False])
def test_learns(first_order):
    torch.manual_seed(0)
    method = MetaNetworks(MLP((8, 1, 1), widths=[16]), WAY, first_order=first_order)
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    found = []
    for _ in range(80):
        centres, labels = 2 * torch.randn(16, WAY, 8), torch.arange(WAY).repeat(16, 3)
        images = (centres.repeat(1, 3, 1) + 0.2 * torch.randn(16, 3 * WAY, 8))[..., None, None]
        e = Episodes(images[:, :WAY], labels[:, :WAY], images[:, WAY:], labels[:, WAY:], labels, WAY)
        loss, metrics = method(e)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(metrics["accuracy"].item())
    assert sum(found[:2]) / 2 < 0.6 < 0.85 < sum(found[-5:]) / 5


def test_half_precision():
    method, e = build(dtype=torch.float32), batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method(e)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_published_sizes():
    method = MetaNetworks(Conv4((3, 84, 84), width=[32] * 3, same_padding=True), 5)
    assert method.map_shape == (32, 11, 11) and method.base.hidden.in_features == method.base.out_features == 288


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"representation_loss": "triplet"}, "choose one of cross_entropy, contrastive"),
        ({"steps": 0}, "steps=0"),
        ({"convolutions": -1}, "convolutions=-1"),
        ({"depth": 2}, "has no option depth"),
    ],
)
def test_refusals_are_one_line(change, message):
    spec = {"backbone": {"name": "mlp"}, "input": {"shape": [1, 4, 4]}, "way": 3}
    with pytest.raises(PipelineError) as caught:
        build_model({**spec, "method": {"name": "meta_networks", **change}})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(PipelineError, match="built for 3 classes"):
        build().eval().adapt(batch().support, LABELS, 4)
