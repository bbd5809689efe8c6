from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.batch import Episodes
from pipeline.errors import PipelineError
from pipeline.functional import meta_lstm as functional
from pipeline.functional.flat import flatten, unflatten
from pipeline.functional.losses import cross_entropy
from pipeline.functional.meta_lstm import preprocess, unroll
from pipeline.methods import meta_lstm
from pipeline.methods.meta_lstm import MetaLSTM
from pipeline.nets.conv4 import Conv4
from pipeline.nets.mlp import MLP

WAY, FORMS = 3, ["loop", "vmap"]
LABELS = torch.tensor([[2, 0, 1, 1, 0], [0, 1, 2, 0, 0]])
QUERY_LABELS = torch.tensor([[0, 1, 2, 2], [1, 1, 0, 2]])
VARIANTS = [
    {"gate_feedback": g, "gradient_scale": s}
    for g, s in itertools.product(("pre_sigmoid", "post_sigmoid"), ("plain", "div_n"))
]


def name_of(options) -> str:
    return "-".join(str(value) for value in options.values())


def batch(dtype=torch.float64) -> Episodes:
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(2, 5, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    query = torch.randn(2, 4, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return Episodes(support, LABELS, query, QUERY_LABELS, torch.arange(WAY).expand(2, WAY), WAY)


def build(backbone="conv", dtype=torch.float64, lively=True, **options) -> MetaLSTM:
    torch.manual_seed(1)
    net = MLP((1, 8, 8), widths=[4]) if backbone == "mlp" else Conv4((1, 8, 8), width=[3, 4], eps=1e-3)
    method = MetaLSTM(net, WAY, **{"hidden": 4, "inner_steps": 3, "inner_steps_eval": 3, **options}).to(dtype)
    if lively:  # at its start the LSTM does almost nothing
        with torch.no_grad():
            for weights in (method.cell_inputs, method.cell_hidden, method.cell_bias, method.gate_weight):
                weights.copy_(torch.randn(weights.shape, dtype=dtype) * 0.4)
            method.gate_bias.copy_(torch.tensor([3.0, -1.0]))
    return method


def gradients(method: MetaLSTM, episodes: Episodes) -> dict[str, torch.Tensor]:
    method.zero_grad()
    method(episodes)[0].backward()
    return {n: p.grad.clone() for n, p in method.named_parameters()}


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backbone", ["conv", "mlp"])
def test_meta_gradient_is_the_central_difference_with_frozen_gradients(backbone, form, options):
    """Of the LSTM, the gates and the initial weights; what the learners' gradients and losses are stays as it is."""
    method, e = build(backbone, inner_loop=form, **options), batch()
    found = gradients(method, e)
    with torch.no_grad():
        start = flatten(method._weights()).expand(2, -1)
        _, _, frozen = method._update(start, e.support, LABELS, 3, remember=True)

    def loss() -> float:
        theta = flatten(method._weights()).expand(2, -1)
        end = unroll(method._cell(), theta, *frozen, *method._options())
        return cross_entropy(method.classify(unflatten(end, method._shapes()), e.query), QUERY_LABELS).item()

    assert method(e)[0].item() == pytest.approx(loss(), abs=1e-12)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in method.named_parameters():
        direction, losses = torch.randn(parameter.shape, generator=generator, dtype=torch.float64), []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += step * direction
                losses.append(loss())
                parameter -= step * direction
        difference = (losses[0] - losses[1]) / 2e-6
        assert (found[name] * direction).sum().item() == pytest.approx(difference, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_replaying_is_keeping_the_graph(options, form, monkeypatch):
    whole = gradients(build(inner_loop=form, **options), batch())
    monkeypatch.setattr(meta_lstm, "GRAPH", 0)
    monkeypatch.setattr(functional, "CHUNK", 37)
    parts = gradients(build(inner_loop=form, **options), batch())
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-12, msg=name)


def by_hand(method: MetaLSTM, support: torch.Tensor, labels: torch.Tensor, running=None) -> list[torch.Tensor]:
    """One task with PyTorch's own LSTM cell and batch-norm, every coordinate a row; the final weights."""
    cell = nn.LSTMCell(4, 4).double()
    with torch.no_grad():
        cell.weight_ih.copy_(method.cell_inputs)
        cell.weight_hh.copy_(method.cell_hidden)
        cell.bias_ih.copy_(method.cell_bias)
        cell.bias_hh.zero_()
    theta = [p.detach().clone() for p in method._weights().values()]
    sizes = [p.numel() for p in theta]
    flat = torch.cat([p.flatten() for p in theta])
    h = c = torch.zeros(len(flat), 4, dtype=torch.float64)
    fed = [torch.zeros_like(flat), torch.zeros_like(flat)]
    for _ in range(3):
        leaves = [v.view_as(p).requires_grad_() for v, p in zip(flat.split(sizes), theta, strict=True)]
        loss = F.cross_entropy(network(leaves, support, running, training=True), labels)
        g = torch.cat([d.flatten() for d in torch.autograd.grad(loss, leaves)])
        if method.gradient_scale == "div_n":
            g = g / len(labels)
        x = torch.cat([preprocess(loss.detach()).expand(len(g), 2), preprocess(g)], 1)
        with torch.no_grad():
            h, c = cell(x, (h, c))
            pre = [
                torch.cat([h, flat[:, None], fed[k][:, None]], 1) @ method.gate_weight[k] + method.gate_bias[k]
                for k in range(2)
            ]
            fed = pre if method.gate_feedback == "pre_sigmoid" else [p.sigmoid() for p in pre]
            flat = pre[0].sigmoid() * flat - pre[1].sigmoid() * g
    return [v.view_as(p) for v, p in zip(flat.split(sizes), theta, strict=True)]


def network(w: list[torch.Tensor], x: torch.Tensor, running, training: bool) -> torch.Tensor:
    """The networks of ``build`` by their parameters in order."""
    if len(w) == 4:
        return F.linear(F.relu(F.linear(x.flatten(1), w[0], w[1])), w[2], w[3])
    convs, norms = w[:2], [w[2:4], w[4:6]]
    for i in range(2):
        mean, var = running[i] if running else (None, None)
        x = F.conv2d(x, convs[i], padding=1)
        x = F.batch_norm(x, mean, var, *norms[i], training=training, momentum=0.9, eps=1e-3)
        x = F.max_pool2d(F.relu(x), 2)
    return F.linear(x.flatten(1), w[6], w[7])


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backbone", ["conv", "mlp"])
def test_the_algorithm_written_out(backbone, form, options):
    """Updates, and in evaluation running averages over them, which begin anew with every task."""
    method, e = build(backbone, inner_loop=form, **options), batch()
    names = list(method._weights())
    assert names[:2] == (["backbone.convs.0.weight", "backbone.convs.1.weight"] if backbone == "conv" else names[:2])
    for training in (True, False):
        state = method.train(training).adapt(e.support, LABELS)
        logits = method.classify(state, e.query)
        for t in range(2):
            running = [(torch.zeros(k).double(), torch.ones(k).double()) for k in (3, 4)]
            end = by_hand(method, e.support[t], LABELS[t], running)
            for name, expected in zip(names, end, strict=True):
                torch.testing.assert_close(state[name][t], expected, rtol=0, atol=1e-12)
            expected = network(end, e.query[t], None if training else running, training)
            torch.testing.assert_close(logits[t], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_only_in_evaluation_answers_are_each_query_s_own(form):
    method, e = build(inner_loop=form), batch()
    for training in (True, False):
        state = method.train(training).adapt(e.support, LABELS)
        fewer = method.classify(state, e.query[:, :2])
        assert torch.allclose(method.classify(state, e.query)[:, :2], fewer, atol=1e-10) is not training
    one = torch.cat([method.classify(state, e.query[:, q : q + 1]) for q in range(4)], 1)
    torch.testing.assert_close(one, method.classify(state, e.query), rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_evaluation_adapts_without_a_graph(form, guard):
    method = build(inner_loop=form).eval()
    with guard():
        support = batch().support.clone()
        state = method.adapt(support, LABELS)
        alone = [method.adapt(support[t : t + 1], LABELS[t : t + 1]) for t in range(2)]
        assert method.classify(state, batch().query).shape == (2, 4, WAY)
    assert not any(v.requires_grad for v in state.values()) and all(p.grad is None for p in method.parameters())
    assert len({v.untyped_storage().data_ptr() for v in state.values()}) == len(state)
    for name, value in state.items():
        torch.testing.assert_close(torch.cat([a[name] for a in alone]), value, rtol=0, atol=1e-12)


def test_a_task_does_not_see_the_others():
    method, e = build(), batch()
    alone = []
    for t in range(2):
        s = slice(t, t + 1)
        one = Episodes(e.support[s], e.support_labels[s], e.query[s], e.query_labels[s], e.classes[s], WAY)
        alone.append(method(one)[0].item())
    assert method(e)[0].item() == pytest.approx(sum(alone) / 2, abs=1e-12)


def test_padding_changes_nothing_without_batch_statistics():
    method, e = build("mlp"), batch()
    padded = Episodes(
        torch.cat([e.support, e.support[:, :1]], 1), torch.cat([LABELS, torch.full((2, 1), -1)], 1),
        torch.cat([e.query, e.query[:, :2]], 1), torch.cat([QUERY_LABELS, torch.full((2, 2), -1)], 1), e.classes, WAY,
    )  # fmt: skip
    for a, b in zip(gradients(method, e).values(), gradients(method, padded).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_how_it_begins():
    method = build(lively=False, hidden=20)
    for weights in (method.cell_inputs, method.cell_hidden, method.cell_bias, method.gate_weight):
        assert 0.009 < weights.abs().max() <= 0.01
    assert method.cell_bias.shape == (80,) and method.gate_weight.shape == (2, 22)
    assert 4 <= method.gate_bias[0] <= 5 and -5 <= method.gate_bias[1] <= -4
    assert not list(method.buffers())
    state = method.eval().adapt(batch().support, LABELS)
    kept = state["head.weight"] / method.head.weight
    assert (kept.median() > 0.9) and (kept.median() < 1)  # forgets little, learns little


def test_the_rate_it_begins_with_can_be_given():
    method = build(lively=False, initial_rate=0.1)
    assert method.gate_bias[1].sigmoid().item() == pytest.approx(0.1) and 4 <= method.gate_bias[0] <= 5


@pytest.mark.parametrize("graph", [True, False])
def test_a_frozen_backbone_adapts_but_is_not_trained(graph, monkeypatch):
    if not graph:
        monkeypatch.setattr(meta_lstm, "GRAPH", 0)
    method, free = build(), gradients(build(), batch())
    method.backbone.requires_grad_(False)
    method(batch())[0].backward()
    assert all(p.grad is None for p in method.backbone.parameters())
    torch.testing.assert_close(method.head.weight.grad, free["head.weight"])
    torch.testing.assert_close(method.cell_hidden.grad, free["cell_hidden"])


def test_training_learns():
    """Tasks whose classes are the sides of a line through the origin."""
    torch.manual_seed(0)
    method = MetaLSTM(
        MLP((2, 1, 1), widths=[16]), way=2, hidden=8, inner_steps=4, inner_steps_eval=4, gradient_scale="plain"
    )
    optimizer = torch.optim.Adam(method.parameters(), lr=2e-2)

    def tasks(count: int) -> Episodes:
        support, query = torch.randn(count, 10, 2, 1, 1), torch.randn(count, 20, 2, 1, 1)
        angle = torch.rand(count, 1) * 6.28
        side = lambda x: ((x[:, :, 0, 0, 0] * angle.cos() + x[:, :, 1, 0, 0] * angle.sin()) > 0).long()  # noqa: E731
        return Episodes(support, side(support), query, side(query), torch.zeros(count, 2).long(), 2)

    with torch.random.fork_rng():
        torch.manual_seed(9)
        test = tasks(100)
    before = method.eval()(test)[1]["accuracy"]
    for _ in range(120):
        method.train()
        optimizer.zero_grad()
        method(tasks(8))[0].backward()
        optimizer.step()
    after = method.eval()(test)[1]["accuracy"]
    assert before < 0.6 < 0.8 < after, (before, after)


def test_half_precision_training():
    method, e = build(dtype=torch.float32), batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method(e)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_loop": "scan"}, "choose one of"),
        ({"gate_feedback": "none"}, "choose one of pre_sigmoid, post_sigmoid"),
        ({"gradient_scale": "sum"}, "choose one of div_n, plain"),
        ({"inner_steps": 0}, "inner_steps=0: there is at least one"),
        ({"hidden": 0}, "hidden=0"),
        ({"initial_rate": 1.0}, "initial_rate=1.0: give a share between 0 and 1"),
    ],
)
def test_refusals_of_options(options, message):
    with pytest.raises(PipelineError, match=message):
        build(**options)


def test_refusals_of_tasks():
    method, e = build().eval(), batch()
    with pytest.raises(PipelineError, match="built for 3 classes"):
        method.adapt(e.support, LABELS, way=5)
    with pytest.raises(PipelineError, match="no support image"):
        method.adapt(e.support, LABELS.clamp(max=1), way=3)
