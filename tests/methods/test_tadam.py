from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.batch import Episodes, Images
from pipeline.errors import PipelineError
from pipeline.methods.tadam import TADAM
from pipeline.model import build_model
from pipeline.nets.conv4 import Conv4
from pipeline.nets.mlp import MLP
from pipeline.nets.resnet12_tadam import ResNet12Tadam
from pipeline.training.optim import build_optimizer

LABELS = torch.tensor([[2, 0, 1, 1, 0], [0, 1, 2, 0, 0]])  # unequal shots, not sorted
QUERY_LABELS = torch.tensor([[0, 1, 2, 2], [1, 1, 0, -1]])  # the last is padding


def batch(dtype=torch.float64) -> Episodes:
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(2, 5, 1, 9, 9, generator=generator, dtype=dtype)
    query = torch.randn(2, 4, 1, 9, 9, generator=generator, dtype=dtype)
    return Episodes(support, LABELS, query, QUERY_LABELS, torch.arange(3).expand(2, 3), 3)


def build(backbone: nn.Module | None = None, **options) -> TADAM:
    """With modulation that is far from the identity, and running averages that are not at their start."""
    torch.manual_seed(1)
    method = TADAM(backbone or ResNet12Tadam((1, 9, 9), widths=[3, 4], num_max_pools=1), classes=6, **options).double()
    if method.task_embedding is not None:
        for parameter in method.task_embedding.parameters():
            nn.init.normal_(parameter, std=0.5)
    for name, buffer in method.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.uniform_(0.5, 1.5)
    return method


def norm(x):
    return x.square().sum(-1).sqrt()


DISTANCES = {
    "euclidean": lambda x, c: norm(x - c),
    "squared_euclidean": lambda x, c: (x - c).square().sum(),
    "cosine": lambda x, c: (x / (norm(x) + 1e-6) - c / (norm(c) + 1e-6)).square().sum(),
}


def by_definition(method: TADAM, e: Episodes, metric: str) -> list[torch.Tensor]:
    """Logits [Q, way] of every task from passes over it alone, in evaluation: class by class and query by query."""
    found = []
    for t in range(e.tasks):
        film = ()
        for _ in range(1 if method.task_embedding is None else 2):
            features = method.backbone(e.support[t], [tuple(v.expand(5, -1) for v in pair) for pair in film])
            means = [features[e.support_labels[t] == c].mean(0) for c in range(3)]
            if method.task_embedding is not None and not film:
                gamma, beta = method.task_embedding(torch.stack(means).mean(0)[None])
                widths = list(method.task_embedding.widths)
                film = list(zip(gamma.split(widths, 1), beta.split(widths, 1), strict=True))
        queries = method.backbone(e.query[t], [tuple(v.expand(4, -1) for v in pair) for pair in film])
        logits = [[-method.scale * DISTANCES[metric](q, m) for m in means] for q in queries]
        found.append(torch.stack([torch.stack(row) for row in logits]))
    return found


@pytest.mark.parametrize("metric", DISTANCES)
@pytest.mark.parametrize("conditioning", [True, False])
def test_logits_by_definition_with_shuffled_labels_and_unequal_shots(metric, conditioning):
    method, e = build(metric=metric, conditioning=conditioning).eval(), batch()
    expected = torch.stack(by_definition(method, e, metric))
    logits = method.classify(method.adapt(e.support, LABELS, 3), e.query)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-8)
    for t in range(2):  # and each task alone
        one = slice(t, t + 1)
        alone = method.classify(method.adapt(e.support[one], LABELS[one]), e.query[one])
        torch.testing.assert_close(alone[0], expected[t], rtol=0, atol=1e-8)
    chosen = QUERY_LABELS >= 0
    losses = -expected.log_softmax(-1)[chosen].gather(1, QUERY_LABELS[chosen][:, None])
    assert method(e)[0].item() == pytest.approx(losses.mean().item(), abs=1e-8)


@pytest.mark.parametrize("backbone", [lambda: Conv4((1, 9, 9), width=[3, 4]), None])
@pytest.mark.parametrize("options", [{}, {"learn_scale": True, "metric": "cosine"}, {"conditioning": False}])
def test_gradient_is_the_finite_difference(backbone, options):
    method, e = build(backbone and backbone(), auxiliary=False, scale=2.0, **options), batch()
    loss, _ = method(e)
    loss.backward()
    parameters = {n: p for n, p in method.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in parameters.values()) and ("scale" in parameters) is (
        "learn_scale" in options
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters.values():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):  # short: ReLU and maxima have kinks
                parameter += step * direction
                values.append(method(e)[0].item())
            parameter += 1e-6 * direction
        expected = (values[0] - values[1]) / 2e-6
        assert (parameter.grad * direction).sum().item() == pytest.approx(expected, rel=2e-4, abs=1e-8)


def test_a_conditioned_method_begins_as_an_unconditioned_one():
    torch.manual_seed(1)
    one = TADAM(Conv4((1, 9, 9), width=[3, 4]), classes=6).double().eval()
    torch.manual_seed(1)
    other = TADAM(Conv4((1, 9, 9), width=[3, 4]), classes=6, conditioning=False).double().eval()
    e = batch()
    logits = [m.classify(m.adapt(e.support, LABELS), e.query) for m in (one, other)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-12)


def test_three_passes_move_the_running_averages():
    method = build(auxiliary=False)
    layer = method.backbone.blocks[0].shortcut_norm
    means, e = [layer.running_mean.clone()], batch()
    method.backbone.blocks[0].shortcut_norm.register_forward_hook(lambda *_: means.append(layer.running_mean.clone()))
    method(e)
    assert len(means) == 4
    for number, images in enumerate((e.support, e.support, e.query)):
        now = method.backbone.blocks[0].shortcut(images.flatten(0, 1)).mean((0, 2, 3))
        torch.testing.assert_close(means[number + 1], 0.95 * means[number] + 0.05 * now)


def test_half_precision_has_float32_logits():
    torch.manual_seed(0)
    method, e = TADAM(Conv4((1, 9, 9), width=[3, 4]), classes=6), batch(torch.float32)
    nn.init.ones_(method.task_embedding.multipliers()[0])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method(e)
        state = method.eval().adapt(e.support, LABELS)
        assert {v.dtype for v in state.values()} == {torch.float32}
        assert method.classify(state, e.query).dtype == torch.float32
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in method.task_embedding.parameters())


@pytest.mark.parametrize(
    ("options", "regime", "absent"),
    [
        ({}, "both", ()),
        ({"auxiliary": False}, "episodic", ("classifier",)),
        ({"conditioning": False}, "both", ("task_embedding",)),
        ({"conditioning": False, "auxiliary": False, "scale": 1.0}, "episodic", ("classifier", "task_embed")),
    ],
)
def test_parts_that_are_switched_off_are_not_there(options, regime, absent):
    method = build(**options)
    assert method.regime == regime
    assert not [name for name in method.state_dict() for part in absent if name.startswith(part)]
    used = {name for name, p in method.named_parameters() if p.requires_grad}
    images = Images(torch.randn(7, 1, 9, 9, dtype=torch.float64), torch.arange(7) % 6)
    method(batch())[0].backward()
    if regime == "both":
        method(images)[0].backward()
    assert used == {name for name, p in method.named_parameters() if p.grad is not None}


def test_auxiliary_task_trains_the_unmodulated_features():
    method = build()
    images = Images(torch.randn(7, 1, 9, 9, dtype=torch.float64), torch.arange(7) % 6)
    loss, figures = method(images)
    logits = method.backbone(images.images) @ method.classifier.weight.T + method.classifier.bias
    assert loss.item() == pytest.approx(-logits.log_softmax(1)[range(7), images.labels].mean().item(), abs=1e-10)
    loss.backward()
    assert all(p.grad is None for p in method.task_embedding.parameters()) and not figures["accuracy"].requires_grad


def test_turns_of_the_auxiliary_task():
    method = build()
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(20000, generator=generator).tolist()
    turns = torch.tensor([draw < method.auxiliary_probability(step, 20000) for step, draw in enumerate(draws)]).double()
    expected = torch.tensor([0.9 ** (k + 1) for k in range(20)], dtype=torch.float64)
    torch.testing.assert_close(turns.view(20, 1000).mean(1), expected, rtol=0, atol=0.05)
    formula = build(auxiliary_start=1.0)
    assert formula.auxiliary_probability(0, 7) == 1
    assert formula.auxiliary_probability(6, 7) == pytest.approx(0.9**17, rel=1e-12)


def test_only_the_weights_of_layers_decay():
    method = build()
    optimizer = build_optimizer(method, {"name": "sgd", "lr": 0.1, "weight_decay": 5e-4})
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(method.parameters()))
    for name, parameter in method.named_parameters():
        expected = 0.0
        if name.endswith(".multiplier"):
            expected = 0.01
        elif ".weights." in name or ".convs." in name or name.endswith("shortcut.weight"):
            expected = 5e-4
        assert decay[id(parameter)] == expected, name
    sum(method.penalties(5e-4).values()).backward()
    for parameter in method.parameters():
        if decay[id(parameter)]:
            torch.testing.assert_close(parameter.grad, decay[id(parameter)] * parameter.detach())
        else:
            assert parameter.grad is None


def test_extend_without_conditioning_leaves_the_known_classes_alone():
    method, e = build(conditioning=False).eval(), batch()
    state = method.adapt(e.support, LABELS)
    more, labels = torch.randn(2, 3, 1, 9, 9, dtype=torch.float64), torch.tensor([[3, 4, 3], [4, 4, 3]])
    extended = method.extend(state, more, labels)
    assert torch.equal(method.classify(extended, e.query)[..., :3], method.classify(state, e.query))
    at_once = method.adapt(torch.cat([e.support, more], 1), torch.cat([LABELS, labels], 1))
    torch.testing.assert_close(extended["prototypes"], at_once["prototypes"])
    with pytest.raises(PipelineError, match="numbered from 3"):
        method.extend(state, more, labels - 1)
    assert build().eval().extend(state, more, labels) is None


def test_all_parts_learn():
    """Gratings in noise, a class a direction: unseen directions become easier, and the modulation is used."""
    generator = torch.Generator().manual_seed(0)
    row, column = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")

    def draw(classes: torch.Tensor) -> torch.Tensor:
        angle = classes[..., None, None] * torch.pi / 12
        phase = 2 * torch.pi * torch.rand(*classes.shape, 1, 1, generator=generator)
        waves = torch.sin(1.5 * (row * angle.cos() + column * angle.sin()) + phase)
        return (waves + 0.7 * torch.randn(waves.shape, generator=generator)).unsqueeze(-3)

    def tasks(first: int) -> Episodes:
        """Of the classes with an even number, for training, or an odd one."""
        classes = first + 2 * torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(4)])
        labels, query_labels = torch.arange(3).repeat(4, 2), torch.arange(3).repeat(4, 4)
        images = [draw(classes.gather(1, y)) for y in (labels, query_labels)]
        return Episodes(images[0], labels, images[1], query_labels, classes, 3)

    torch.manual_seed(0)
    method = TADAM(ResNet12Tadam((1, 12, 12), widths=[8, 16], num_max_pools=1, momentum=0.2), classes=6)
    optimizers = [build_optimizer(method, {"name": "sgd", "lr": 0.1, "momentum": 0.9}) for _ in range(2)]
    tests = [tasks(1) for _ in range(10)]

    def accuracy() -> float:
        method.eval()
        with torch.no_grad():
            found = sum(float(method(e)[1]["accuracy"]) for e in tests) / len(tests)
        method.train()
        return found

    before = accuracy()
    for _ in range(25):
        labels = torch.randint(0, 6, (16,), generator=generator)
        for optimizer, given in zip(optimizers, (Images(draw(2 * labels), labels), tasks(0)), strict=True):
            loss, _ = method(given)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(method.parameters(), 1.0)
            optimizer.step()
    assert accuracy() > max(before + 0.3, 0.85), before
    assert all(float(m.detach().abs().max()) > 1e-4 for m in method.task_embedding.multipliers())


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        (MLP, {}, "MLP cannot be modulated: choose resnet12_tadam, conv4 or another"),
        (MLP, {"conditioning": False, "metric": "dot"}, "metric='dot' is not known: choose one of euclidean"),
        (Conv4, {"classes": None}, "auxiliary=true needs the number of training classes"),
    ],
)
def test_refusals_are_one_line(backbone, options, message):
    with pytest.raises(PipelineError) as caught:
        TADAM(backbone((1, 16, 16)), **{"classes": 6, **options})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_any_backbone_serves_without_conditioning():
    spec = {"method": {"name": "tadam", "conditioning": False}, "backbone": {"name": "mlp"}, "classes": 6}
    method = build_model({**spec, "input": {"shape": [1, 9, 9]}}).double()
    build_optimizer(method, {"name": "adam", "lr": 0.1})
    assert method.embeds_once and method(batch())[0].isfinite()
