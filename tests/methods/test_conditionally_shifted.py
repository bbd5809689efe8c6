from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from pipeline.batch import Episodes
from pipeline.errors import PipelineError
from pipeline.methods.conditionally_shifted import ConditionallyShifted
from pipeline.model import build_model
from pipeline.nets.blocks import fresh_copy
from pipeline.nets.conv4 import Conv4
from pipeline.nets.mlp import MLP
from pipeline.nets.stages import stages

WAY = 3
LABELS = torch.tensor([[2, 0, 1, 1, 0], [0, 1, 2, 0, 0]])
QUERY_LABELS = torch.tensor([[0, 1, 2, -1], [1, 1, 0, 2]])
BACKBONES = {
    "conv": lambda: Conv4((1, 8, 8), width=[3, 4, 3]),
    "strided": lambda: Conv4((1, 8, 8), width=[3, 4], strided=True, affine="beta_only"),
    "leaky": lambda: Conv4((1, 8, 8), width=[3, 4], negative_slope=0.2),
    "mlp": lambda: MLP((1, 8, 8), widths=[6, 5]),
}
OPTIONS = [
    {"feedback": f, "similarity": s, "shift": p}
    for f, s, p in itertools.product(["direct", "gradient"], ["cosine", "dot"], ["outside", "inside"])
]


def batch(dtype=torch.float64, seed=0) -> Episodes:
    generator = torch.Generator().manual_seed(seed)
    support = torch.randn(2, 5, 1, 8, 8, generator=generator, dtype=dtype)
    query = torch.randn(2, 4, 1, 8, 8, generator=generator, dtype=dtype)
    return Episodes(support, LABELS, query, QUERY_LABELS, torch.arange(WAY).expand(2, WAY), WAY)


def build(backbone="conv", dtype=torch.float64, **options) -> ConditionallyShifted:
    torch.manual_seed(1)
    return ConditionallyShifted(BACKBONES[backbone](), WAY, units=4, key_features=6, **options).to(dtype)


def by_definition(method: ConditionallyShifted, support, labels, query) -> torch.Tensor:
    """Logits [Q, way] of one task in evaluation: memory by memory, neuron by neuron, query by query."""
    net, layers = method.backbone, stages(method.backbone)
    slope = getattr(net, "negative_slope", 0.0)
    memory = []

    def sigma(a):
        return torch.where(a > 0, a, slope * a)

    for x, y in zip(support, labels, strict=True):
        h, a = x[None], []
        for t in range(len(layers)):
            a.append(layers.pre_activation(t, h).detach().requires_grad_(True))
            h = sigma(a[-1])
        logits = method.head(net(x[None]))[0].detach()
        error = logits.softmax(0) - F.one_hot(y, WAY)
        # the gradient at every layer, by going on from that layer alone
        values = []
        for t in range(len(layers)):
            h = sigma(a[t])
            for u in range(t + 1, len(layers)):
                h = sigma(layers.pre_activation(u, h))
            loss = F.cross_entropy(method.head(layers.features(h)), y[None])
            (gradient,) = torch.autograd.grad(loss, a[t])
            if method.direct:
                information = [(1.0 if n > 0 else slope) * error for n in a[t].flatten()]
            else:
                information = [g[None] for g in gradient.flatten()]
            values.append(torch.stack([method.value(i)[0] for i in information]))
        output = [e * error if method.direct else e[None] for e in error]
        values.append(torch.stack([method.value(i)[0] for i in output]))
        memory.append((method.keys(x[None])[0], values))
    answers = []
    for x in query:
        key = method.keys(x[None])[0]
        scores = [key @ k for k, _ in memory]
        if method.similarity == "cosine":
            scores = [s / (key.norm() * k.norm()) for s, (k, _) in zip(scores, memory, strict=True)]
        weights = torch.stack(scores).softmax(0)
        shifts = [sum(w * v[t] for w, (_, v) in zip(weights, memory, strict=True)) for t in range(len(layers) + 1)]
        h = x[None]
        for t in range(len(layers)):
            own = str(t) in method.statistics
            norm = (lambda z, t=t: method.statistics[str(t)](z, layers.norm(t))) if own else None
            a = layers.pre_activation(t, h, norm)
            shift = shifts[t].view_as(a) if t >= method.first else torch.zeros_like(a)
            h = sigma(a + shift) if method.inside else sigma(a) + sigma(shift)
        answers.append(method.head(layers.features(h))[0] + shifts[-1])
    return torch.stack(answers)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("backbone", ["conv", "leaky", "mlp"])
def test_by_definition(backbone, options):
    method, e = build(backbone, **options), batch()
    for _ in range(3):  # running averages that are not the start's
        method(e)
    method.eval()
    with torch.no_grad():
        logits = method.classify(method.adapt(e.support, LABELS), e.query)
    for t in range(2):
        expected = by_definition(method, e.support[t], LABELS[t], e.query[t])
        torch.testing.assert_close(logits[t], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shifted", [0, 1, 2, 3])
def test_only_the_last_layers_are_shifted(shifted):
    method, e = build(shifted=shifted), batch()
    method(e)
    method.eval()
    state = method.adapt(e.support, LABELS)
    assert sorted(k for k in state if k.startswith("values.")) == sorted(
        [f"values.{t}" for t in range(3 - shifted, 3)] + ["values.output"]
    )
    assert sorted(method.statistics) == [str(t) for t in range(4 - shifted, 3)]
    expected = by_definition(method, e.support[0], LABELS[0], e.query[0])
    torch.testing.assert_close(method.classify(state, e.query)[0], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("options", OPTIONS[::2] + OPTIONS[1::2][:1], ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("backbone", ["conv", "strided", "mlp"])
def test_meta_gradient_is_the_central_finite_difference(backbone, options):
    method, e = build(backbone, **options), batch(seed=1)  # of seed 0 a ReLU is within 1e-7 of its kink
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
        assert (parameter.grad * direction).sum().item() == pytest.approx(difference, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("feedback", ["direct", "gradient"])
def test_padding_counts_nowhere(feedback):
    method, e = build(feedback=feedback).eval(), batch()
    padded = torch.cat([e.support[:, :2], torch.randn(2, 1, 1, 8, 8).double(), e.support[:, 2:]], dim=1)
    labels = torch.cat([LABELS[:, :2], torch.full((2, 1), -1), LABELS[:, 2:]], dim=1)
    answers = [method.classify(method.adapt(*task), e.query) for task in ((e.support, LABELS), (padded, labels))]
    torch.testing.assert_close(*answers, rtol=0, atol=1e-12)
    cut = Episodes(e.support[:1], LABELS[:1], e.query[:1, :3], QUERY_LABELS[:1, :3], e.classes[:1], WAY)
    whole = Episodes(e.support[:1], LABELS[:1], e.query[:1], QUERY_LABELS[:1], e.classes[:1], WAY)
    assert method(cut)[0].item() == pytest.approx(method(whole)[0].item(), abs=1e-12)


@pytest.mark.parametrize("feedback", ["direct", "gradient"])
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("frozen", [False, True])
def test_evaluation_has_no_graph_and_a_task_does_not_see_the_others(feedback, guard, frozen):
    method, e = build(feedback=feedback).eval().requires_grad_(not frozen), batch()
    with guard():
        support = e.support.clone()
        state = method.adapt(support, LABELS)
        logits = method.classify(state, e.query)
        alone = method.classify(method.adapt(support[1:], LABELS[1:]), e.query[1:, :2])
    assert all(len(value) == 2 for value in state.values())
    if guard is not torch.enable_grad:
        assert not any(value.requires_grad for value in state.values())
    torch.testing.assert_close(alone, logits[1:, :2], rtol=0, atol=1e-12)


def test_statistics_of_shifted_queries_are_their_own():
    method, e = build(), batch()
    before = [n.running_mean.clone() for n in method.backbone.norms]
    method(e)
    norms, own = method.backbone.norms, method.statistics
    with torch.no_grad():
        h = method.backbone.convs[0](e.support.flatten(0, 1))
    after_support = 0.9 * before[0] + 0.1 * h.mean((0, 2, 3))
    with torch.no_grad():
        q = method.backbone.convs[0](e.query.flatten(0, 1))
    # the first layer sees support and queries as they are: both count; the second sees only unshifted activations
    torch.testing.assert_close(norms[0].running_mean, 0.9 * after_support + 0.1 * q.mean((0, 2, 3)))
    assert not torch.allclose(norms[1].running_mean, own["1"].plain.running_mean, atol=1e-4)
    assert set(own) == {"1", "2"} and not list(own.parameters())


def test_stages_are_the_backbone():
    e = batch()
    others = [Conv4((1, 8, 8), width=[3, 4, 2], same_padding=True), Conv4((1, 8, 8), width=[3, 4], average=True)]
    for net in [*(make() for make in BACKBONES.values()), *others]:
        net = net.double()
        h, layers = e.support[0], stages(net)
        for t in range(len(layers)):
            h = F.leaky_relu(layers.pre_activation(t, h), layers.slope)
        torch.testing.assert_close(layers.features(h), net(e.support[0]), rtol=0, atol=1e-12)


def test_key_network_has_a_start_of_its_own():
    torch.manual_seed(0)
    net = Conv4((1, 28, 28), init="xavier")
    other = fresh_copy(net)
    for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
        assert a.ndim == 1 or (a - b).abs().mean() > 0.3 * a.abs().mean(), name


def test_learns():
    torch.manual_seed(0)
    method = ConditionallyShifted(MLP((8, 1, 1), widths=[32]), WAY)
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    found = []
    for _ in range(70):
        centres, labels = 2 * torch.randn(16, WAY, 8), torch.arange(WAY).repeat(16, 3)
        images = (centres.repeat(1, 3, 1) + 0.2 * torch.randn(16, 3 * WAY, 8))[..., None, None]
        e = Episodes(images[:, :WAY], labels[:, :WAY], images[:, WAY:], labels[:, WAY:], labels, WAY)
        loss, metrics = method(e)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(metrics["accuracy"].item())
    assert sum(found[:5]) / 5 < 0.6 < 0.9 < sum(found[-5:]) / 5


@pytest.mark.parametrize("feedback", ["direct", "gradient"])
def test_half_precision(feedback):
    method, e = build(dtype=torch.float32, feedback=feedback), batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method(e)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feedback": "none"}, "choose one of direct, gradient"),
        ({"similarity": "euclidean"}, "choose one of cosine, dot"),
        ({"shift": "both"}, "choose one of outside, inside"),
        ({"shifted": 9}, "the backbone has 1 hidden layers"),
    ],
)
def test_refusals_are_one_line(change, message):
    spec = {"backbone": {"name": "mlp"}, "input": {"shape": [1, 4, 4]}, "way": 3}
    with pytest.raises(PipelineError) as caught:
        build_model({**spec, "method": {"name": "conditionally_shifted", **change}})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_backbones_that_cannot_be_taken_apart(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n"
        "  def __init__(self): super().__init__(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 4))\n"
    )
    for backbone in ({"name": "snail_resnet"}, {"name": "module", "path": str(tmp_path / "net.py")}):
        for options in ({}, {"shifted": 1}):
            spec = {"method": {"name": "conditionally_shifted", **options}, "backbone": backbone, "way": 3}
            with pytest.raises(PipelineError, match="choose backbone=conv4 or mlp"):
                build_model({**spec, "input": {"shape": [1, 16, 16]}})
    with pytest.raises(PipelineError, match="built for 3 classes"):
        build().eval().adapt(batch().support, LABELS, 4)
