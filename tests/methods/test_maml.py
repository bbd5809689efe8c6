from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from pipeline.batch import Episodes
from pipeline.errors import PipelineError
from pipeline.functional.losses import cross_entropy, labelled, summed_cross_entropy
from pipeline.methods.maml import MAML
from pipeline.nets.conv4 import Conv4
from pipeline.nets.mlp import MLP

WAY = 3
SUPPORT_LABELS = torch.tensor([[2, 0, 1, 1, 0], [0, 1, 2, 0, 0]])
QUERY_LABELS = torch.tensor([[0, 1, 2, 2], [1, 1, 0, 2]])
FORMS = ["loop", "vmap"]


def batch(dtype=torch.float64, shape=(1, 8, 8), seed=0) -> Episodes:
    generator = torch.Generator().manual_seed(seed)
    support = torch.randn(2, 5, *shape, generator=generator, dtype=dtype)
    query = torch.randn(2, 4, *shape, generator=generator, dtype=dtype)
    return Episodes(support, SUPPORT_LABELS, query, QUERY_LABELS, torch.arange(WAY).expand(2, WAY), WAY)


def build(backbone="conv", dtype=torch.float64, **options) -> MAML:
    torch.manual_seed(1)
    net = {
        "conv": lambda: Conv4((1, 8, 8), width=[3, 4]),
        "strided": lambda: Conv4((1, 8, 8), width=[3, 3], strided=True, affine="beta_only"),
        "mlp": lambda: MLP((1, 8, 8), widths=[6]),
    }[backbone]()
    defaults = {"inner_lr": 0.3, "inner_steps": 2, "inner_steps_eval": 2, "loss_scaling": "mean"}
    return MAML(net, WAY, **{**defaults, **options}).to(dtype)


def gradients(method: MAML, episodes: Episodes) -> dict[str, torch.Tensor]:
    method.zero_grad()
    loss, _ = method(episodes)
    loss.backward()
    return {n: p.grad.clone() for n, p in method.named_parameters()}


OPTIONS = [
    {"adapt_parameters": a, "transductive": t, "loss_scaling": s}
    for a, t, s in itertools.product(["all", "all_but_norm", "head"], [True, False], ["mean", "finn"])
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backbone", ["conv", "strided", "mlp"])
def test_meta_gradient_is_the_central_finite_difference(backbone, form, options):
    method, episodes = build(backbone, inner_loop=form, **options), batch()
    found = gradients(method, episodes)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in method.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += step * direction
            losses.append(method(episodes)[0].item())
            with torch.no_grad():
                parameter -= step * direction
        difference = (losses[0] - losses[1]) / 2e-6
        assert (found[name] * direction).sum().item() == pytest.approx(difference, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("backbone", ["conv", "strided", "mlp"])
def test_vmap_is_the_loop(backbone, first_order, options):
    episodes = batch()
    loop, vmap = (build(backbone, inner_loop=form, first_order=first_order, **options) for form in FORMS)
    for a, b in zip(gradients(loop, episodes).values(), gradients(vmap, episodes).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    states = [m.eval().adapt(episodes.support, episodes.support_labels) for m in (loop, vmap)]
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=1e-10)
    answers = [m.classify(s, episodes.query) for m, s in zip((loop, vmap), states, strict=True)]
    torch.testing.assert_close(*answers, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transductive", [True, False])
def test_first_order_is_the_gradient_at_the_adapted_parameters(form, transductive):
    episodes = batch()
    options = {"inner_loop": form, "transductive": transductive}
    found = gradients(build(first_order=True, **options), episodes)
    state = build(**options).eval().adapt(episodes.support, episodes.support_labels)
    mean = {name: torch.zeros_like(g) for name, g in found.items()}
    for t in range(2):
        there = build(inner_steps=0, **options)
        with torch.no_grad():
            for name, parameter in there.named_parameters():
                parameter.copy_(state[name][t])
        for name, g in gradients(there, one_task(episodes, t)).items():
            mean[name] += g / 2
    for name in found:
        torch.testing.assert_close(found[name], mean[name], rtol=0, atol=1e-10)
    second = gradients(build(**options), episodes)
    assert max((second[n] - found[n]).abs().max() for n in found) > 1e-3


def one_task(e: Episodes, t: int) -> Episodes:
    s = slice(t, t + 1)
    return Episodes(e.support[s], e.support_labels[s], e.query[s], e.query_labels[s], e.classes[s], e.way)


@pytest.mark.parametrize("form", FORMS)
def test_adaptation_written_out(form):
    """Two steps of gradient descent on the support's mean loss, by hand."""
    method, episodes = build("mlp", inner_loop=form), batch()
    state = method.eval().adapt(episodes.support, episodes.support_labels)
    for t in range(2):
        w1, b1, w2, b2 = (p.detach().clone() for p in method.parameters())
        x, y = episodes.support[t].flatten(1), nn.functional.one_hot(SUPPORT_LABELS[t], WAY).double()
        for _ in range(2):
            a = x @ w1.T + b1
            h = a.clamp(min=0)
            d = ((h @ w2.T + b2).softmax(-1) - y) / len(x)
            da = (d @ w2) * (a > 0)
            w1, b1 = w1 - 0.3 * da.T @ x, b1 - 0.3 * da.sum(0)
            w2, b2 = w2 - 0.3 * d.T @ h, b2 - 0.3 * d.sum(0)
        for expected, name in zip((w1, b1, w2, b2), dict(method.named_parameters()), strict=True):
            torch.testing.assert_close(state[name][t], expected, rtol=0, atol=1e-12)


def test_finn_scaling_is_the_mean_with_a_rate_times_the_way():
    episodes = batch()
    finn = build(loss_scaling="finn", inner_lr=0.1).eval()
    mean = build(loss_scaling="mean", inner_lr=0.1 * WAY).eval()
    answers = [m.classify(m.adapt(episodes.support, SUPPORT_LABELS), episodes.query) for m in (finn, mean)]
    torch.testing.assert_close(*answers, rtol=0, atol=1e-12)
    shots = labelled(SUPPORT_LABELS).double() / WAY
    expected = (summed_cross_entropy(answers[0], QUERY_LABELS) / shots).mean()
    assert finn(episodes)[0].item() == pytest.approx(expected.item(), abs=1e-12)
    assert mean(episodes)[0].item() == pytest.approx(cross_entropy(answers[1], QUERY_LABELS).item(), abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transductive", [True, False])
def test_a_task_does_not_see_the_others(form, transductive):
    method, episodes = build(inner_loop=form, transductive=transductive), batch()
    loss, _ = method(episodes)
    alone = [method(one_task(episodes, t))[0] for t in range(2)]
    assert loss.item() == pytest.approx(sum(a.item() for a in alone) / 2, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("adapted", ["all", "head"])
def test_inductive_answers_do_not_depend_on_the_other_queries(form, adapted):
    episodes = batch()
    for transductive in (False, True):
        method = build(inner_loop=form, transductive=transductive, adapt_parameters=adapted).eval()
        state = method.adapt(episodes.support, SUPPORT_LABELS)
        assert any(n.startswith("statistics.") for n in state) is not transductive
        same = torch.allclose(
            method.classify(state, episodes.query)[:, :2], method.classify(state, episodes.query[:, :2]), atol=1e-10
        )
        assert same is not transductive


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("frozen", [False, True])
def test_evaluation_adapts_without_a_graph(form, guard, frozen):
    episodes = batch()
    method = build(inner_loop=form).eval().requires_grad_(not frozen)
    with guard():
        support = episodes.support.clone()
        state = method.adapt(support, SUPPORT_LABELS)
        assert method.classify(state, episodes.query).shape == (2, 4, WAY)
    assert not any(value.requires_grad for value in state.values())
    assert all(value.shape[0] == 2 for value in state.values())
    start = dict(method.named_parameters())
    assert all((state[n][0] - start[n]).abs().max() > 1e-6 for n in state)
    assert all(p.grad is None for p in method.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_takes_its_own_number_of_steps(form):
    episodes = batch()
    few = build(inner_steps=1, inner_steps_eval=3, inner_loop=form)
    many = build(inner_steps=3, inner_loop=form)
    in_training = many.adapt(episodes.support, SUPPORT_LABELS)["head.weight"]
    torch.testing.assert_close(few.eval().adapt(episodes.support, SUPPORT_LABELS)["head.weight"], in_training)


def test_what_is_adapted():
    episodes = batch()
    keys = {
        a: set(build(adapt_parameters=a).adapt(episodes.support, SUPPORT_LABELS))
        for a in ("all", "all_but_norm", "head")
    }
    assert keys["head"] == {"head.weight", "head.bias"}
    assert keys["all"] - keys["all_but_norm"] == {f"backbone.norms.{i}.{w}" for i in (0, 1) for w in ("weight", "bias")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scaling", ["mean", "finn"])
def test_padding_changes_nothing_without_batch_statistics(form, scaling):
    method, e = build("mlp", inner_loop=form, loss_scaling=scaling), batch()
    padded = Episodes(
        torch.cat([e.support, e.support[:, :1]], 1),
        torch.cat([e.support_labels, torch.full((2, 1), -1)], 1),
        torch.cat([e.query, e.query[:, :2]], 1),
        torch.cat([e.query_labels, torch.full((2, 2), -1)], 1),
        e.classes,
        WAY,
    )
    for a, b in zip(gradients(method, e).values(), gradients(method, padded).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


class NativeNet(nn.Sequential):
    out_features = 4 * 36

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())


def test_a_backbone_with_native_batch_norm_gets_right_gradients():
    torch.manual_seed(0)
    net = NativeNet()
    weights = {k: v for k, v in net.state_dict().items() if "running" not in k and "num" not in k}
    both = []
    for form in FORMS:
        method = MAML(NativeNet(), WAY, inner_lr=0.3, inner_loop=form).double()
        method.backbone.load_state_dict(weights)
        torch.manual_seed(1)
        nn.init.normal_(method.head.weight)
        nn.init.zeros_(method.head.bias)
        both.append(gradients(method, batch()))
    for name in both[0]:
        torch.testing.assert_close(both[0][name], both[1][name], rtol=0, atol=1e-10)


def test_the_state_is_plain_and_another_process_can_use_it():
    episodes = batch()
    method = build().eval()
    state = {k: torch.from_numpy(v.numpy().copy()) for k, v in method.adapt(episodes.support, SUPPORT_LABELS).items()}
    fresh = build().eval()
    torch.testing.assert_close(
        fresh.classify(state, episodes.query),
        method.classify(method.adapt(episodes.support, SUPPORT_LABELS), episodes.query),
        rtol=0,
        atol=0,
    )


def test_training_learns():
    """Meta-training on tasks whose classes are the sign patterns of two pixels."""
    torch.manual_seed(0)
    method = MAML(MLP((2, 1, 1), widths=[32]), way=2, inner_lr=0.2, inner_steps=2, loss_scaling="mean")
    optimizer = torch.optim.Adam(method.parameters(), lr=5e-3)

    def tasks(count: int) -> Episodes:
        support, query = torch.randn(count, 10, 2, 1, 1), torch.randn(count, 20, 2, 1, 1)
        angle = torch.rand(count, 1) * 6.28
        side = lambda x: ((x[:, :, 0, 0, 0] * angle.cos() + x[:, :, 1, 0, 0] * angle.sin()) > 0).long()  # noqa: E731
        return Episodes(support, side(support), query, side(query), torch.zeros(count, 2).long(), 2)

    with torch.random.fork_rng():
        torch.manual_seed(9)
        test = tasks(100)
    before = method(test)[1]["accuracy"]
    for _ in range(150):
        optimizer.zero_grad()
        method(tasks(16))[0].backward()
        optimizer.step()
    after = method(test)[1]["accuracy"]
    assert before < 0.75 < 0.85 < after


@pytest.mark.parametrize(
    "options", [{"loss_scaling": "sum"}, {"adapt_parameters": "body"}, {"inner_loop": "scan"}, {"inner_loop": ["loop"]}]
)
def test_unknown_options_are_refused(options):
    with pytest.raises(PipelineError, match="choose one of"):
        build(**options)


def test_refusals():
    method, episodes = build().eval(), batch()
    with pytest.raises(PipelineError, match="built for 3 classes"):
        method.adapt(episodes.support, SUPPORT_LABELS, way=5)
    with pytest.raises(PipelineError, match="no support image"):
        method.adapt(episodes.support, SUPPORT_LABELS.clamp(max=1), way=3)
    assert method.extend(method.adapt(episodes.support, SUPPORT_LABELS), episodes.support, SUPPORT_LABELS) is None


def test_automatic_form_by_shape():
    """Per-task weights make convolutions slow where maps are large; without convolutions, or on small maps, vmap."""
    few, many = torch.zeros(2, 5, 1, 28, 28), torch.zeros(2, 20, 1, 28, 28)
    nets = [Conv4((1, 28, 28)), Conv4((1, 28, 28), strided=True), MLP((1, 28, 28), widths=[6])]
    forms = [MAML(net, WAY)._each_task(x).__name__.partition("_")[0] for net in nets for x in (few, many)]
    assert forms == ["loop", "loop", "vmap", "loop", "vmap", "vmap"]
    method = MAML(nets[0], WAY)
    before = torch.get_rng_state()
    method._each_task(few)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any("forward" in vars(layer) for layer in nets[0].norms)  # which the count had taken away


@pytest.mark.parametrize("form", FORMS)
def test_features_from_elsewhere_are_asked_by_a_head_of_zeros(form):
    """After one inner step every row is lr / S times what the features of its class have more than its share of all."""
    method, episodes = build("mlp", inner_loop=form, inner_steps_eval=1).eval(), batch()
    method.begun_elsewhere(["head.weight", "head.bias"])
    state = method.adapt(episodes.support, episodes.support_labels, WAY)
    for task in range(2):
        features = method.backbone(episodes.support[task])
        more = torch.eye(WAY, dtype=torch.float64)[SUPPORT_LABELS[task]] - 1 / WAY
        torch.testing.assert_close(state["head.weight"][task], 0.3 / 5 * more.T @ features)
        torch.testing.assert_close(state["head.bias"][task], 0.3 / 5 * more.sum(0))
    before = build("mlp").head.weight
    kept = build("mlp")
    kept.begun_elsewhere([])
    assert torch.equal(kept.head.weight, before), "a head that came with them stays"
