from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.batch import Episodes
from pipeline.errors import PipelineError
from pipeline.functional.reptile import DISTANCES, consecutive, consensus_gradient, task_minibatches
from pipeline.methods import reptile
from pipeline.methods.reptile import Reptile
from pipeline.nets.conv4 import Conv4
from pipeline.nets.mlp import MLP

ROOT = Path(__file__).resolve().parents[2]
WAY, FORMS = 3, ["loop", "vmap"]
LABELS = torch.tensor([[2, 0, 1, 1, 0], [0, 1, 2, 0, 0], [1, 2, 0, 2, 2]])
QUERY_LABELS = torch.tensor([[0, 1, 2, 2], [1, 1, 0, 2], [0, 0, 2, 1]])


def batch(tasks=3, dtype=torch.float64) -> Episodes:
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(3, 5, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    query = torch.randn(3, 4, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    classes = torch.arange(WAY).expand(3, WAY)
    return Episodes(*(t[:tasks] for t in (support, LABELS, query, QUERY_LABELS, classes)), WAY)


def drawn(steps=4, size=3, tasks=3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    e, generator = batch(tasks), torch.Generator().manual_seed(5)
    index = torch.randint(5, (steps, tasks, size), generator=generator)
    each = torch.arange(tasks)[:, None]
    return [(e.support[each, i], e.support_labels[each, i]) for i in index]


def build(backbone="mlp", dtype=torch.float64, **options) -> Reptile:
    torch.manual_seed(1)
    net = MLP((1, 8, 8), widths=[4]) if backbone == "mlp" else Conv4((1, 8, 8), width=[3, 4])
    defaults = {"inner_lr": 0.05, "inner_steps": 3, "inner_batch": 4, "inner_steps_eval": 3, "inner_batch_eval": 4}
    return Reptile(net, WAY, **{**defaults, **options}).to(dtype)


def gradients(method: Reptile, minibatches) -> dict[str, torch.Tensor]:
    method.zero_grad()
    method.meta_loss(minibatches)[0].backward()
    return {n: p.grad.clone() for n, p in method.named_parameters()}


# --- the algorithm written out, one task, one parameter and one filter at a time


def forward(w: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return F.relu(x.flatten(1) @ w[0].T + w[1]) @ w[2].T + w[3]


def distance_by_definition(kind: str, a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(a, b, strict=True):
        rows = list(zip(x, y, strict=True)) if x.ndim > 1 and kind != "l2" else []
        if not rows:
            total = total + ((x - y) ** 2).sum()
        for p, q in rows:
            d = p / p.norm() - q / q.norm() if kind == "filter_normalised" else (p - q) / q.norm()
            total = total + (d**2).sum()
    return total


class ByHand:
    """Plain Python: weights of every task as lists of tensors."""

    def __init__(self, method: Reptile) -> None:
        self.m = method
        self.start = [p.detach().clone() for p in method.parameters()]
        self.moments = self.fresh()
        self.losses: list[float] = []

    def fresh(self) -> dict:
        return {"t": 0, "m": [torch.zeros_like(p) for p in self.start], "v": [torch.zeros_like(p) for p in self.start]}

    def grad(self, w, x, y, others=None, task=0):
        leaves = [p.clone().requires_grad_() for p in w]
        loss = F.cross_entropy(forward(leaves, x), y, reduction=self.m.loss_reduction)
        self.losses.append(F.cross_entropy(forward(leaves, x), y).item())
        if self.m.consensus:
            with_me = [leaves if i == task else o for i, o in enumerate(others)]
            mean = [sum(parts) / len(with_me) for parts in zip(*with_me, strict=True)]
            if self.m.consensus_mean == "constant":
                mean = [p.detach() for p in mean]
            loss = loss + self.m.consensus * distance_by_definition(self.m.consensus_distance, leaves, mean)
        return torch.autograd.grad(loss, leaves)

    def step(self, w, g, moments):
        if self.m.inner_optimizer == "sgd":
            return [p - self.m.inner_lr * d for p, d in zip(w, g, strict=True)]
        moments["t"] += 1
        b1, b2, t, out = self.m.beta1, self.m.beta2, moments["t"], []
        for k, (p, d) in enumerate(zip(w, g, strict=True)):
            moments["m"][k] = b1 * moments["m"][k] + (1 - b1) * d
            moments["v"][k] = b2 * moments["v"][k] + (1 - b2) * d**2
            rate = self.m.inner_lr * (1 - b2**t) ** 0.5 / (1 - b1**t)
            out.append(p - rate * moments["m"][k] / (moments["v"][k].sqrt() + 1e-8))
        return out

    def update(self, minibatches) -> list[torch.Tensor]:
        """theta - mean(theta_task), or the mean last displacement, for each parameter."""
        m, tasks = self.m, len(minibatches[0][0])
        own = [self.moments if m.moments == "persistent" else self.fresh() for _ in range(tasks)]
        weights, last = [self.start] * tasks, [self.start] * tasks
        if m.consensus:
            for x, y in minibatches:
                last, moved = weights, list(weights)
                for i in range(tasks):
                    seen = moved if m.consensus_order == "sequential" else weights
                    moved[i] = self.step(weights[i], self.grad(weights[i], x[i], y[i], seen, i), own[i])
                weights = moved
        else:
            for i in range(tasks):
                for x, y in minibatches:
                    last = last[:i] + [weights[i]] + last[i + 1 :]
                    new = self.step(weights[i], self.grad(weights[i], x[i], y[i]), own[i])
                    weights = weights[:i] + [new] + weights[i + 1 :]
        origin = [self.start] * tasks if m.displacement == "all" else last
        moves = [[a - b for a, b in zip(o, w, strict=True)] for o, w in zip(origin, weights, strict=True)]
        return [sum(parts) / tasks for parts in zip(*moves, strict=True)]


OPTIMIZERS = [
    {"inner_optimizer": "sgd"},
    {"moments": "persistent"},
    {"moments": "reset"},
    {"moments": "persistent", "beta1": 0.9},
    {"moments": "reset", "beta1": 0.9, "beta2": 0.9},
]
PLAIN = [{"displacement": d, "loss_reduction": r} for d in ("all", "last") for r in ("sum", "mean")]
PENALTIES = [
    {"consensus": 0.7, "consensus_distance": d, "consensus_mean": m, "consensus_order": o}
    for d, m, o in itertools.product(DISTANCES, ("full", "constant"), ("simultaneous", "sequential"))
]


def name_of(options) -> str:
    return "-".join(str(value) for value in options.values())


COMBINED = [
    {**options, **optimizer, "inner_loop": FORMS[(i + j) % 2]}  # both forms with every option
    for (i, options), (j, optimizer) in itertools.product(enumerate(PLAIN + PENALTIES), enumerate(OPTIMIZERS))
]


@pytest.mark.parametrize("options", COMBINED, ids=name_of)
def test_the_gradient_is_the_update_by_hand(options):
    """Two meta-steps, so that what persists shows; the loss is the mean cross-entropy of the inner steps."""
    method = build(**options)
    by_hand = ByHand(method)
    for minibatches in (drawn(), drawn(steps=2)):
        by_hand.losses = []
        expected = by_hand.update(minibatches)
        found = gradients(method, minibatches)
        for e, (name, f) in zip(expected, found.items(), strict=True):
            torch.testing.assert_close(f, e, rtol=0, atol=1e-11, msg=name)
    loss, figures = method.meta_loss(minibatches)
    if not method._persistent:  # otherwise this third step begins with other moments
        assert loss.item() == pytest.approx(sum(by_hand.losses) / len(by_hand.losses), abs=1e-12)
    assert ("consensus" in figures) is bool(method.consensus)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("full", [True, False])
def test_gradient_of_the_penalty(distance, full):
    """Against central differences and, for l2, in closed form."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": torch.Size([2, 3, 2]), "b": torch.Size([2])}
    weights = torch.randn(4, 14, generator=generator, dtype=torch.float64)
    penalty, found = consensus_gradient(weights, weights.mean(0), 4, shapes, distance, full)
    function = DISTANCES[distance]
    torch.testing.assert_close(penalty, function(weights, weights.mean(0).expand(4, -1), shapes))
    if distance == "l2":
        torch.testing.assert_close(found, 2 * (0.75 if full else 1) * (weights - weights.mean(0)))
    for i, k in itertools.product(range(4), range(14)):
        step, values = torch.zeros(4, 14, dtype=torch.float64), []
        for size in (1e-6, -1e-6):
            step[i, k] = size
            moved = weights + step
            mean = (moved if full else weights).mean(0)
            values.append(function(moved[i : i + 1], mean[None], shapes).item())
        assert found[i, k].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-7)


def test_filter_normalised_distance_ignores_the_scale_of_filters():
    shapes = {"w": torch.Size([3, 4])}
    a, b = torch.randn(2, 12), torch.randn(2, 12)
    scale = torch.tensor([0.1, 7.0, 2.0]).repeat_interleave(4)
    distance = DISTANCES["filter_normalised"]
    torch.testing.assert_close(distance(a * scale, b, shapes), distance(a, b, shapes))
    assert torch.isfinite(distance(torch.zeros(1, 12), b[:1], shapes)).all()


def test_one_task_has_nobody_to_agree_with():
    plain, pulled = (gradients(build(consensus=c), drawn(tasks=1)) for c in (0.0, 5.0))
    for name in plain:
        torch.testing.assert_close(pulled[name], plain[name], rtol=0, atol=1e-12)


def test_the_penalty_keeps_the_tasks_together():
    spread = []
    for consensus in (0.0, 0.3, 3.0):
        method = build(consensus=consensus, consensus_distance="l2", inner_optimizer="sgd")
        result, _ = method._train(drawn(), method._moments().expand(3), consensus)
        spread.append((result.after - result.after.mean(0)).square().sum().item())
    assert spread[0] > 1.05 * spread[1] and spread[1] > 1.5 * spread[2], spread


@pytest.mark.parametrize("backbone", ["mlp", "conv"])
def test_one_sgd_step_is_the_gradient_of_the_mean_loss(backbone):
    """Against central differences: with one inner step Reptile is joint training."""
    method = build(backbone, inner_optimizer="sgd", loss_reduction="mean", inner_lr=0.3)
    minibatches = drawn(steps=1)
    found, generator = gradients(method, minibatches), torch.Generator().manual_seed(2)
    for name, parameter in method.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += step * direction
                losses.append(method.meta_loss(minibatches)[0].item())
                parameter -= step * direction
        expected = 0.3 * (losses[0] - losses[1]) / 2e-6
        assert (found[name] * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("form", FORMS)
def test_sgd_with_rate_one_goes_to_the_mean_of_the_tasks(form):
    method = build("conv", inner_loop=form, moments="reset")
    ends = []
    for t in range(3):
        alone = build("conv", inner_loop=form, moments="reset")
        optimizer = torch.optim.SGD(alone.parameters(), lr=1.0)
        alone.meta_loss([(x[t : t + 1], y[t : t + 1]) for x, y in drawn()])[0].backward()
        optimizer.step()
        ends.append([p.detach() for p in alone.parameters()])
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    method.meta_loss(drawn())[0].backward()
    optimizer.step()
    for parameter, *each in zip(method.parameters(), *ends, strict=True):
        torch.testing.assert_close(parameter.detach(), sum(each) / 3, rtol=0, atol=1e-12)


# --- minibatches


def test_minibatches_run_through_every_shuffle_to_its_end():
    row = consecutive(7, 4, 9, torch.Generator().manual_seed(0)).flatten().tolist()
    shuffles = [row[i : i + 7] for i in range(0, 35, 7)]
    assert all(sorted(s) == list(range(7)) for s in shuffles) and shuffles[0] != shuffles[1]
    assert consecutive(3, 5, 2).shape == (2, 5)  # more than there are: some twice


def test_minibatches_of_a_task_know_neither_padding_nor_other_tasks():
    labels = torch.tensor([[0, -1, 1, 2, -1, 0], [0, 1, 2, 0, 1, 2]])
    index = task_minibatches(labels, 4, 5, seed=0)
    assert index.shape == (5, 2, 4)
    assert sorted(set(index[:, 0].flatten().tolist())) == [0, 2, 3, 5]
    assert torch.equal(task_minibatches(labels[1:], 4, 5, seed=0)[:, 0], index[:, 1])
    dense = task_minibatches(torch.tensor([[0, 1, 2, 0]]), 4, 5, seed=0)[:, 0]
    assert torch.equal(torch.tensor([0, 2, 3, 5])[dense], index[:, 0])


def test_a_training_task_is_support_and_query_together():
    e = batch()
    images = torch.cat([e.support, e.query], 1)
    drawn_ = build(inner_steps=9, inner_batch=5)._minibatches(e)
    assert len(drawn_) == 9 and drawn_[0][0].shape == (3, 5, 1, 8, 8)
    for t in range(3):
        row = torch.cat([x[t] for x, _ in drawn_])
        found = [int((images[t] == x).flatten(1).all(1).nonzero()) for x in row]
        assert all(sorted(found[i : i + 9]) == list(range(9)) for i in range(0, 45, 9))
    tail = build(displacement="last_on_query")._minibatches(e)
    assert len(tail) == 3 and torch.equal(tail[2][0], e.query) and torch.equal(tail[2][1], QUERY_LABELS)
    assert all((x.flatten(2)[:, :, None] == e.support.flatten(2)[:, None]).all(-1).any(-1).all() for x, _ in tail[:2])
    build(displacement="last_on_query", inner_steps=1)(e)[0].backward()


def test_padding_changes_nothing():
    e, found = batch(), []
    padded = Episodes(
        e.support, e.support_labels, torch.cat([e.query, e.query[:, :2]], 1),
        torch.cat([e.query_labels, torch.full((3, 2), -1)], 1), e.classes, WAY,
    )  # fmt: skip
    for episodes in (e, padded):
        method = build()
        torch.manual_seed(3)
        method(episodes)[0].backward()
        found.append([p.grad for p in method.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# --- evaluation


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("statistics", ["support_and_query", "support", "batch"])
def test_evaluation(form, guard, statistics):
    """Without graph, the same every time and for every task alone, and without a trace in the method."""
    method = build("conv", inner_loop=form, query_statistics=statistics)
    method(batch())[0].backward()  # moments
    method.zero_grad()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    method.eval()
    with guard():
        e = batch()
        support, query = e.support.clone(), e.query.clone()
        torch.manual_seed(0)
        state = method.adapt(support, LABELS)
        torch.manual_seed(1)
        again = method.adapt(support, LABELS)
        logits = method.classify(state, query)
        alone = [
            method.classify(method.adapt(support[t : t + 1], LABELS[t : t + 1]), query[t : t + 1]) for t in range(3)
        ]
    assert all(torch.equal(state[k], again[k]) and len(state[k]) == 3 for k in state)
    assert not any(v.requires_grad for v in state.values())
    assert len({v.untyped_storage().data_ptr() for v in state.values()}) == len(state)
    torch.testing.assert_close(torch.cat(alone), logits, rtol=0, atol=1e-10)
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters())


def test_evaluation_is_training_on_the_support():
    """50 steps by the same rule, from the moments that training left."""
    method = build(beta1=0.5)
    method(batch())[0].backward()
    by_hand = ByHand(method)
    parts = {}
    for key, flat in (("m", method.first_moment), ("v", method.second_moment)):
        sizes = [p.numel() for p in by_hand.start]
        parts[key] = [v.view_as(p).clone() for v, p in zip(flat.split(sizes), by_hand.start, strict=True)]
    by_hand.moments = {"t": int(method.moment_steps), **parts}
    e = batch()
    index = task_minibatches(LABELS, 4, 3, seed=0)[:, 1]
    moved = by_hand.update([(e.support[1, i][None], LABELS[1, i][None]) for i in index])
    state = method.eval().adapt(e.support, LABELS)
    for (name, p), move in zip(method.named_parameters(), moved, strict=True):
        torch.testing.assert_close(state[name][1], p.detach() - move, rtol=0, atol=1e-12)
    fresh = build(beta1=0.5).eval()
    fresh.load_state_dict({**method.state_dict(), "second_moment": torch.zeros_like(method.second_moment)})
    assert not torch.allclose(fresh.adapt(e.support, LABELS)["head.weight"], state["head.weight"], atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_what_normalises_a_query(form, monkeypatch):
    monkeypatch.setattr(reptile, "BATCH_IMAGES", 13)  # two queries at a time
    e, answers = batch(), {}
    for statistics in ("support_and_query", "support", "batch"):
        method = build("conv", inner_loop=form, query_statistics=statistics).eval()
        state = method.adapt(e.support, LABELS)
        answers[statistics] = method.classify(state, e.query)
        fewer = method.classify(state, e.query[:, 1:3])
        assert torch.allclose(fewer, answers[statistics][:, 1:3], atol=1e-10) is (statistics != "batch")
    assert not torch.allclose(answers["support"], answers["support_and_query"], atol=1e-3)
    for t, q in itertools.product(range(3), range(4)):
        own = {name: state[name][t] for name, _ in method.named_parameters()}
        together = torch.cat([e.support[t], e.query[t, q : q + 1]])
        expected = method._logits(own, together)[-1]
        torch.testing.assert_close(answers["support_and_query"][t, q], expected, rtol=0, atol=1e-10)


def test_without_batch_norm_a_query_goes_alone():
    method = build().eval()
    assert "support" not in method.adapt(batch().support, LABELS)


# --- across steps


def test_a_restored_method_goes_on_with_its_moments():
    one, two = build("conv", beta1=0.9), build("conv", beta1=0.9)
    one.meta_loss(drawn())
    assert int(one.moment_steps) == 4 * 3
    two.load_state_dict(one.state_dict())
    for a, b in zip(gradients(one, drawn()).values(), gradients(two, drawn()).values(), strict=True):
        assert torch.equal(a, b)
    assert set(build(inner_optimizer="sgd").state_dict()) == set(dict(build().named_parameters()))


def test_a_frozen_backbone_adapts_but_is_not_trained():
    method = build()
    method.backbone.requires_grad_(False)
    method.meta_loss(drawn())[0].backward()
    assert all(p.grad is None for p in method.backbone.parameters())
    free = gradients(build(), drawn())
    torch.testing.assert_close(method.head.weight.grad, free["head.weight"])


def test_half_precision_training():
    method, e = build("conv", dtype=torch.float32, consensus=0.1), batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method(e)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in method.parameters())


@pytest.mark.parametrize("options", [{}, {"consensus": 0.01}, {"displacement": "last_on_query"}], ids=name_of)
def test_training_learns(options):
    """Tasks whose classes are the sides of a line through the origin."""
    torch.manual_seed(0)
    method = Reptile(
        MLP((2, 1, 1), widths=[32]), way=2, inner_lr=0.02, inner_steps=5, inner_batch=10,
        inner_steps_eval=2, inner_batch_eval=10, **options,
    )  # fmt: skip
    optimizer = torch.optim.SGD(method.parameters(), lr=0.5)

    def tasks(count: int) -> Episodes:
        support, query = torch.randn(count, 10, 2, 1, 1), torch.randn(count, 20, 2, 1, 1)
        angle = torch.rand(count, 1) * 6.28
        side = lambda x: ((x[:, :, 0, 0, 0] * angle.cos() + x[:, :, 1, 0, 0] * angle.sin()) > 0).long()  # noqa: E731
        return Episodes(support, side(support), query, side(query), torch.zeros(count, 2).long(), 2)

    with torch.random.fork_rng():
        torch.manual_seed(9)
        test = tasks(100)

    def accuracy() -> float:
        with torch.no_grad():
            found = method.eval()(test)[1]["accuracy"].item()
        method.train()
        return found

    before = accuracy()
    for _ in range(60):
        optimizer.zero_grad()
        method(tasks(5))[0].backward()
        optimizer.step()
    assert before < 0.78 < 0.83 < accuracy()


@pytest.mark.parametrize(
    "options",
    [
        {"inner_optimizer": "lbfgs"}, {"moments": "kept"}, {"loss_reduction": "none"}, {"displacement": "first"},
        {"query_statistics": "running"}, {"consensus_distance": "cosine"}, {"consensus_mean": "half"},
        {"consensus_order": "random"}, {"inner_loop": "scan"},
    ],
)  # fmt: skip
def test_unknown_options_are_refused(options):
    with pytest.raises(PipelineError, match="choose one of"):
        build(**options)


def test_refusals(monkeypatch):
    for option in ("inner_steps", "inner_batch", "inner_steps_eval", "inner_batch_eval"):
        with pytest.raises(PipelineError, match=f"{option}=0: there is at least one"):
            build(**{option: 0})
    method, e = build().eval(), batch()
    with pytest.raises(PipelineError, match="built for 3 classes"):
        method.adapt(e.support, LABELS, way=5)
    with pytest.raises(PipelineError, match="built for 3 classes"):
        build()(replace(e, way=4))
    with pytest.raises(PipelineError, match="no support image"):
        method.adapt(e.support, LABELS.clamp(max=1), way=3)
    monkeypatch.setattr(reptile, "_workers", lambda: 2)
    with pytest.raises(PipelineError, match="one worker"):
        build(consensus=0.1, consensus_order="sequential")(e)


def test_automatic_form():
    images = torch.zeros(2, 5, 1, 8, 8)
    assert [build(b, inner_loop="auto")._each_task(images).__name__ for b in ("conv", "mlp")] == [
        "loop_tasks",
        "vmap_tasks",
    ]


# --- two workers

DISTRIBUTED = {
    "full": {"consensus": 0.7, "inner_optimizer": "sgd"},
    "constant": {"consensus": 0.7, "consensus_mean": "constant", "moments": "reset"},
    "alone": {"moments": "reset"},
}


def halves(rank: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(8)
    images = torch.randn(3, 4, 6, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(WAY, (3, 4, 6), generator=generator)
    part = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    return [(x[part], y[part]) for x, y in zip(images, labels, strict=True)]


class _Looks(nn.Module):
    """Computes by the values of its input, which vmap cannot map."""

    out_features = 16

    def __init__(self) -> None:
        super().__init__()
        self.net = Conv4((1, 8, 8), width=[3, 4])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images) * (2.0 if images.detach().abs().max().item() > 1e6 else 1.0)


def test_queries_one_by_one_through_a_network_that_vmap_cannot_map():
    torch.manual_seed(1)
    net, e = _Looks(), batch(dtype=torch.float32)
    looking, plain = (Reptile(n, WAY, inner_steps_eval=2).eval() for n in (net, copy.deepcopy(net.net)))
    plain.head = copy.deepcopy(looking.head)
    answers = [m.classify(m.adapt(e.support, e.support_labels), e.query) for m in (looking, plain)]
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)


class _Given(nn.Module):
    """Calls a method with minibatches, so that DistributedDataParallel can wrap it."""

    def __init__(self, method: Reptile) -> None:
        super().__init__()
        self.method = method

    def forward(self, minibatches):
        return self.method.meta_loss(minibatches)[0]


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for key, options in DISTRIBUTED.items():
        ddp = nn.parallel.DistributedDataParallel(_Given(build("conv", **options)))
        ddp(halves(rank)).backward()
        torch.save({n: p.grad for n, p in ddp.module.method.named_parameters()}, folder / f"{key}.{rank}.pt")
    persistent = nn.parallel.DistributedDataParallel(_Given(build("conv", moments="persistent")))
    for _ in range(2):
        persistent(halves(rank))
    torch.save(persistent.module.method.state_dict(), folder / f"moments.{rank}.pt")
    torch.distributed.barrier()  # neither leaves while the other still reads
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_are_one(tmp_path):
    """The mean over tasks, and the mean that the penalty pulls to, are over the tasks of both."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    try:
        errors = [p.communicate(timeout=240)[1] for p in processes]
        assert [p.returncode for p in processes] == [0, 0], "\n".join(errors)
    finally:
        for p in processes:
            p.kill()
    for key, options in DISTRIBUTED.items():
        expected = gradients(build("conv", **options), halves(None))
        for rank in range(2):
            found = torch.load(tmp_path / f"{key}.{rank}.pt", weights_only=True)
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12, msg=f"{key} {name}")
    # Each worker's moments go on from the first worker's after one step.
    first = build("conv", moments="persistent")
    first.meta_loss(halves(0))
    for rank in range(2):
        mine = build("conv", moments="persistent")
        mine.load_state_dict(first.state_dict())
        mine.meta_loss(halves(rank))
        found = torch.load(tmp_path / f"moments.{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["second_moment"], mine.second_moment, rtol=0, atol=1e-14)


if __name__ == "__main__":
    worker(int(sys.argv[2]), Path(sys.argv[1]))
