from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from pipeline.batch import Episodes
from pipeline.errors import PipelineError
from pipeline.functional.losses import cross_entropy, labelled, summed_cross_entropy
from pipeline.methods.maml import MAML
from pipeline.methods.maml_plus_plus import MAMLPlusPlus, step_weights
from pipeline.nets.conv4 import Conv4
from pipeline.nets.mlp import MLP

WAY, FORMS = 3, ["loop", "vmap"]
LABELS = torch.tensor([[2, 0, 1, 1, 0], [0, 1, 2, 0, 0]])
QUERY_LABELS = torch.tensor([[0, 1, 2, -1], [1, 1, 0, 2]])


def batch(dtype=torch.float64) -> Episodes:
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(2, 5, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    query = torch.randn(2, 4, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return Episodes(support, LABELS, query, QUERY_LABELS, torch.arange(WAY).expand(2, WAY), WAY)


def one_task(e: Episodes, t: int) -> Episodes:
    s = slice(t, t + 1)
    return Episodes(e.support[s], e.support_labels[s], e.query[s], e.query_labels[s], e.classes[s], e.way)


def net(backbone: str) -> nn.Module:
    torch.manual_seed(1)
    return {
        "conv": lambda: Conv4((1, 8, 8), width=[3, 4], negative_slope=0.01),
        "strided": lambda: Conv4((1, 8, 8), width=[3, 3], strided=True, affine="beta_only"),
        "mlp": lambda: MLP((1, 8, 8), widths=[6]),
    }[backbone]()


def build(backbone="conv", dtype=torch.float64, epoch=2, disturbed=True, **options) -> MAMLPlusPlus:
    defaults = {"inner_lr": 0.3, "inner_steps": 3, "inner_steps_eval": 3, "epoch_steps": 5}
    method = MAMLPlusPlus(net(backbone), WAY, **{**defaults, **options}).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if disturbed and ("rates" in name or "norms" in name):  # no two steps alike
                parameter *= 0.7 + 0.6 * torch.rand(parameter.shape, generator=generator)
        method.steps_taken.fill_(epoch * method.epoch_steps)
    return method


def gradients(method: nn.Module, episodes: Episodes) -> dict[str, torch.Tensor]:
    method.zero_grad()
    loss, _ = method(episodes)
    loss.backward()
    return {n: p.grad.clone() for n, p in method.named_parameters() if p.requires_grad}


OPTIONS = [
    {"multi_step_epochs": m, "transductive": t, "per_step_norm": p, "inner_loop": f}
    for (m, t, p), f in zip(itertools.product([10, 0], [True, False], [True, False]), FORMS * 4, strict=True)
]
OPTIONS += [{**o, "inner_loop": FORMS[1 - FORMS.index(o["inner_loop"])]} for o in OPTIONS]


def name_of(options) -> str:
    return "-".join(str(value) for value in options.values())


@pytest.mark.parametrize(
    ("backbone", "options"),
    [("conv", o) for o in OPTIONS] + [(b, o) for b in ("strided", "mlp") for o in OPTIONS[:8:3]],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_meta_gradient_is_the_central_finite_difference(backbone, options):
    """Of weights, inner rates and every step's rows of batch-norm."""
    method, episodes = build(backbone, **options), batch()
    found, generator = gradients(method, episodes), torch.Generator().manual_seed(2)
    assert len(found) == len(list(method.parameters()))
    for name, parameter in method.named_parameters():
        direction, losses = torch.randn(parameter.shape, generator=generator, dtype=torch.float64), []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += step * direction
            losses.append(method(episodes)[0].item())
            with torch.no_grad():
                parameter -= step * direction
        difference = (losses[0] - losses[1]) / 2e-6
        assert (found[name] * direction).sum().item() == pytest.approx(difference, rel=1e-5, abs=1e-7), name


def by_definition(method: MAMLPlusPlus, e: Episodes, second_order: bool) -> torch.Tensor:
    """Task by task and step by step, with a row of batch-norm and a rate each, query losses weighted by hand."""
    own, steps = dict(method.named_parameters()), method.inner_steps
    weights = [0.0] * (steps - 1) + [1.0]
    if method.epoch < method.multi_step_epochs:
        weights = step_weights(steps, method.epoch, method.multi_step_epochs)
    total = torch.zeros((), dtype=torch.float64)
    for t in range(e.tasks):
        w = {n: p for n, p in own.items() if n.startswith(("backbone.", "head.")) and "norms" not in n}
        for s in range(steps):
            norms = {n: p[s] if method._rows else p for n, p in own.items() if "norms" in n}
            loss = cross_entropy(method._logits({**norms, **w}, e.support[t]), e.support_labels[t])
            g = torch.autograd.grad(loss, list(w.values()), create_graph=second_order)
            rates = [own[f"rates.{n.replace('.', '-')}"][s] for n in w]
            w = {n: p - r * d for (n, p), r, d in zip(w.items(), rates, g, strict=True)}
            logits = method._logits({**norms, **w}, e.query[t])
            total = total + weights[s] * cross_entropy(logits, e.query_labels[t]) / e.tasks
    return total


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("multi_step", [False, True])
@pytest.mark.parametrize("backbone", ["conv", "mlp"])
def test_the_algorithm_written_out(backbone, multi_step, first_order, form):
    method = build(
        backbone, multi_step_epochs=5 if multi_step else 2, first_order_epochs=3 if first_order else 2, inner_loop=form
    )
    e = batch()
    found, loss = gradients(method, e), method(e)[0]
    expected = by_definition(method, e, second_order=not first_order)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    parameters = dict(method.named_parameters())
    wanted = torch.autograd.grad(expected, list(parameters.values()))
    for name, g in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(found[name], g, rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("transductive", [False, True])
def test_without_its_additions_it_is_maml(first_order, transductive):
    plus = build(
        disturbed=False, inner_lr=0.25, multi_step_epochs=0, per_step_norm=False, learn_inner_lr=False,
        first_order_epochs=9 if first_order else 0, transductive=transductive,
    )  # fmt: skip
    plain = MAML(
        net("conv"), WAY, 0.25, 3, 3, first_order, "mean", adapt_parameters="all_but_norm", transductive=transductive
    ).double()
    plain.load_state_dict({n: v for n, v in plus.state_dict().items() if n in plain.state_dict()})
    e = batch()
    found, expected = gradients(plus, e), gradients(plain, e)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12)
    for method in (plus, plain):
        method.eval()
    logits = [m.classify(m.adapt(e.support, LABELS), e.query) for m in (plus, plain)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-12)
    losses = summed_cross_entropy(logits[0], QUERY_LABELS) / labelled(QUERY_LABELS)
    assert plus(e)[0].item() == pytest.approx(losses.mean().item(), abs=1e-12)


def test_weights_of_the_steps():
    for steps, epochs in itertools.product([1, 3, 5], [10, 15]):
        for epoch in range(epochs + 3):
            weights = step_weights(steps, epoch, epochs)
            assert sum(weights) == pytest.approx(1) and weights[-1] == max(weights) and len(weights) == steps
    assert step_weights(5, 0, 10) == [0.2] * 5
    assert step_weights(5, 5, 10) == pytest.approx([0.1] * 4 + [0.6])
    assert step_weights(5, 10, 10) == pytest.approx([0.006] * 4 + [0.976])


def test_epochs_pass_and_are_restored():
    method, e = build(epoch=0, epoch_steps=2, multi_step_epochs=2, first_order_epochs=1), batch()
    losses = {}
    for step in range(6):
        assert method.epoch == step // 2
        losses.setdefault(method.epoch, []).append(method(e)[0].item())
        method.after_step()
    assert all(a == b for a, b in losses.values()) and len({a for a, _ in losses.values()}) == 3
    restored = build(epoch_steps=2, multi_step_epochs=2, first_order_epochs=1)
    restored.load_state_dict(method.state_dict())
    assert restored.epoch == 3 and restored(e)[0].item() == method(e)[0].item()


def test_no_step_uses_the_last_rate():
    found = gradients(build(), batch())
    rates = {n: g for n, g in found.items() if n.startswith("rates.")}
    assert len(rates) == 4 and all(g.shape == (4,) and g[3] == 0 for g in rates.values())
    assert all((g[:3] != 0).all() for g in rates.values())


def test_clipping_leaves_the_inner_rates_as_they_are():
    method = build()
    rates, clipped = {id(p) for p in method.rates.parameters()}, {id(p) for p in method.clipped()}
    assert clipped == {id(p) for p in method.parameters()} - rates and len(rates) == 4


def test_fixed_rates_are_not_trained():
    method = build(learn_inner_lr=False)
    assert not any(n.startswith("rates.") for n in gradients(method, batch()))
    assert any(n.startswith("rates.") for n in method.state_dict())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_evaluation_adapts_without_a_graph(form, guard):
    method = build(inner_loop=form, inner_steps_eval=2).eval()
    with guard():
        support = batch().support.clone()
        state = method.adapt(support, LABELS)
        alone = [method.adapt(support[t : t + 1], LABELS[t : t + 1]) for t in range(2)]
        assert method.classify(state, batch().query).shape == (2, 4, WAY)
    assert not any(value.requires_grad for value in state.values())
    for name, value in state.items():
        torch.testing.assert_close(torch.cat([a[name] for a in alone]), value, rtol=0, atol=1e-12)
    row = method.get_parameter("backbone.norms.0.weight")[1].detach()
    assert torch.equal(state["backbone.norms.0.weight"], row.expand(2, -1))
    assert all(p.grad is None for p in method.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_inductive_answers_do_not_depend_on_the_other_queries(form):
    e = batch()
    for transductive in (False, True):
        method = build(inner_loop=form, transductive=transductive).eval()
        state = method.adapt(e.support, LABELS)
        fewer = method.classify(state, e.query[:, :2])
        assert torch.allclose(method.classify(state, e.query)[:, :2], fewer, atol=1e-10) is not transductive


@pytest.mark.parametrize("form", FORMS)
def test_a_task_does_not_see_the_others(form):
    method, e = build(inner_loop=form), batch()
    alone = [method(one_task(e, t))[0].item() for t in range(2)]
    assert method(e)[0].item() == pytest.approx(sum(alone) / 2, abs=1e-12)


@pytest.mark.parametrize("options", [{}, {"per_step_norm": False}], ids=["per_step_norm", "one_norm"])
def test_the_extractor_is_the_backbone_of_the_first_step(options):
    method = build(**options).eval()
    with torch.no_grad():
        for name, parameter in method.backbone.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape))
    images = batch().support.flatten(0, 1)
    first = {n: p[0] if method._rows and "norm" in n else p for n, p in method.backbone.named_parameters()}
    expected = torch.func.functional_call(method.backbone, first, (images,))
    assert torch.equal(method.extractor()(images), expected)


def test_a_frozen_backbone_adapts_but_is_not_trained():
    for form in FORMS:
        method = build(inner_loop=form)
        method.backbone.requires_grad_(False)
        found = gradients(method, batch())
        torch.testing.assert_close(found["head.weight"], gradients(build(inner_loop=form), batch())["head.weight"])
        assert not any(name.startswith("backbone.") for name in found)


def test_a_backbone_that_came_frozen_stays_so():
    """As a configuration freezes it: its gains and biases, too, are not trained for any inner step."""
    method = MAMLPlusPlus(net("conv").requires_grad_(False), WAY, inner_steps=3, inner_steps_eval=3).double()
    assert method._rows and not any(p.requires_grad for p in method.backbone.parameters())
    assert not any(name.startswith("backbone.") for name in gradients(method, batch()))


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_training(form):
    method, e = build(dtype=torch.float32, inner_loop=form), batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method(e)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in method.parameters())


def test_training_learns():
    """Tasks whose classes are the sides of a line through the origin."""
    torch.manual_seed(0)
    method = MAMLPlusPlus(
        MLP((2, 1, 1), widths=[32]), way=2, inner_lr=0.1, inner_steps=2, inner_steps_eval=2,
        multi_step_epochs=2, first_order_epochs=1, epoch_steps=30,
    )  # fmt: skip
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)

    def tasks(count: int) -> Episodes:
        support, query = torch.randn(count, 10, 2, 1, 1), torch.randn(count, 20, 2, 1, 1)
        angle = torch.rand(count, 1) * 6.28
        side = lambda x: ((x[:, :, 0, 0, 0] * angle.cos() + x[:, :, 1, 0, 0] * angle.sin()) > 0).long()  # noqa: E731
        return Episodes(support, side(support), query, side(query), torch.zeros(count, 2).long(), 2)

    with torch.random.fork_rng():
        torch.manual_seed(9)
        test = tasks(100)
    before = method.eval()(test)[1]["accuracy"]
    for _ in range(100):
        method.train()
        optimizer.zero_grad()
        method(tasks(8))[0].backward()
        optimizer.step()
        method.after_step()
    assert before < 0.75 < 0.85 < method.eval()(test)[1]["accuracy"]
    rates = [r.detach() for r in method.rates.values()]
    assert all((r[:2] != 0.1).all() and r[2] == 0.1 for r in rates)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_loop": "scan"}, "choose one of"),
        ({"inner_steps": 0}, "inner_steps=0: there is at least one"),
        ({"inner_steps_eval": 4}, "inner_steps_eval=4 is more than inner_steps=3"),
        ({"epoch_steps": 0}, "epoch_steps=0"),
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
