"""Every head of the baselines against PyTorch's own layers and optimizers, one task at a time."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.batch import Images
from pipeline.errors import PipelineError
from pipeline.functional.fine_tuning import Descent, epoch_orders, fine_tune_cosine, fine_tune_linear, initial_weights
from pipeline.functional.support_initialised import hardness, mean_entropy
from pipeline.methods.baseline import Baseline
from pipeline.nets.conv4 import Conv4
from pipeline.nets.mlp import MLP

WAY, CLASSES = 3, 7
LABELS = torch.tensor([[2, 0, 1, 1, 0, 0], [0, 1, 2, 0, 0, -1]])


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SUPPORT, QUERY = draw(2, 6, 1, 8, 8), draw(2, 4, 1, 8, 8, seed=1)


def build(conv=False, **options) -> Baseline:
    torch.manual_seed(1)
    backbone = Conv4((1, 8, 8), width=[3, 4]) if conv else MLP((1, 8, 8), widths=[10])
    method = Baseline(backbone, CLASSES, **options).double()
    if conv:  # running averages that are not those of the support
        method.train()
        for seed in range(3):
            method.backbone(1 + 2 * draw(20, 1, 8, 8, seed=seed + 5))
    return method.eval()


class Reference(nn.Module):
    """The network of one task, of modules of its own."""

    def __init__(self, method: Baseline, weight, bias) -> None:
        super().__init__()
        self.backbone, self.classifier = copy.deepcopy(method.backbone), copy.deepcopy(method.classifier)
        self.new = nn.Linear(weight.shape[1], WAY).double()
        with torch.no_grad():
            self.new.weight.copy_(weight)
            self.new.bias.copy_(bias)

    def forward(self, images, kind):
        x = self.backbone(images)
        if kind == "random":
            return self.new(x)
        x = {"dhillon": lambda: self.classifier(x).relu(), "features": lambda: x.relu(), "blog": lambda: x}[kind]()
        weight = F.normalize(self.new.weight, dim=-1) if kind == "blog" else self.new.weight
        return F.linear(F.normalize(x, dim=-1), weight, self.new.bias)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_frozen_heads_by_torch(kind, batch_size):
    descent = Descent(epochs=6, batch_size=batch_size, lr=0.3, weight_decay=0.05)
    features, tasks = draw(3, 6, 4), 3
    labels = torch.cat([LABELS, torch.tensor([[1, 2, 0, -1, -1, -1]])])
    weight, bias = draw(tasks, WAY, 4, seed=2), draw(tasks, WAY, seed=3)
    orders = epoch_orders(labels, 6)
    length = weight.norm(dim=-1, keepdim=True) * 1.3
    if kind == "linear":
        found = fine_tune_linear(features, labels, weight, bias, orders, descent)
    else:
        found = fine_tune_cosine(features, labels, weight, length, 2.5, orders, descent)
    for t in range(tasks):
        start = [weight[t], bias[t] if kind == "linear" else length[t]]
        parameters = [p.clone().requires_grad_() for p in start]
        optimizer = torch.optim.SGD(parameters, 0.3, 0.9, 0.9, 0.05)
        for order in orders[:, t]:
            order = order[order >= 0]
            assert sorted(order.tolist()) == [i for i in range(6) if labels[t, i] >= 0]
            for part in order.split(batch_size):
                x = features[t, part]
                if kind == "linear":
                    scores = F.linear(x, *parameters)
                else:
                    x = x / (x.norm(dim=-1, keepdim=True) + 1e-5)
                    scores = 2.5 * F.linear(x, parameters[1] * F.normalize(parameters[0], dim=-1))
                optimizer.zero_grad()
                F.cross_entropy(scores, labels[t, part]).backward()
                optimizer.step()
        for mine, theirs in zip(found, parameters, strict=True):
            torch.testing.assert_close(mine[t], theirs.detach(), rtol=1e-9, atol=1e-9)


def test_orders_are_those_of_a_task_alone():
    together = epoch_orders(LABELS, 50)
    assert torch.equal(epoch_orders(LABELS[1:, :5], 50)[:, 0], together[:, 1, :5]) and (together[:, 1, 5] == -1).all()
    assert torch.equal(epoch_orders(LABELS[:1], 50), together[:, :1])
    assert len({tuple(order.tolist()) for order in together[:, 0]}) > 40
    counts = torch.stack([together[:, 0, place].bincount(minlength=6) for place in range(6)])
    assert counts.min() > 0


@pytest.mark.parametrize("head", ["linear", "cosine", "nearest", "votes", "prototype", "svm", "ridge"])
def test_frozen_heads_do_not_depend_on_other_tasks_or_the_order_of_queries(head):
    method = build(head=head, epochs=3)
    assert method.embeds_once
    with torch.inference_mode():
        state = method.adapt(SUPPORT, LABELS)
        logits = method.classify(state, QUERY)
        alone = method.classify(method.adapt(SUPPORT[1:, :5], LABELS[1:, :5]), QUERY[1:].flip(1))
    assert all(len(value) == 2 and not value.requires_grad for value in state.values()) and logits.shape == (2, 4, WAY)
    torch.testing.assert_close(alone.flip(1), logits[1:], rtol=0, atol=1e-10)


def test_votes_image_by_image():
    method = build(head="votes")
    with torch.no_grad():
        logits = method.classify(method.adapt(SUPPORT, LABELS), QUERY)
        x, y = method.backbone(QUERY[0]), method.backbone(SUPPORT[0])
    for q in range(4):
        votes = [0.0] * WAY
        for i in range(6):
            if LABELS[0, i] >= 0:
                votes[LABELS[0, i]] += F.cosine_similarity(x[q], y[i], dim=0).item()
        assert logits[0, q].tolist() == pytest.approx(votes, abs=1e-7)


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "squared_euclidean"])
@pytest.mark.parametrize("head", ["nearest", "prototype"])
def test_distances_image_by_image(head, distance):
    method = build(head=head, distance=distance)
    with torch.no_grad():
        logits = method.classify(method.adapt(SUPPORT, LABELS), QUERY)
        x, y = method.backbone(QUERY[1]), method.backbone(SUPPORT[1])

    def far(a, b):
        if distance == "cosine":
            return 1 - F.cosine_similarity(a, b, dim=0)
        return (a - b).square().sum() if distance == "squared_euclidean" else (a - b).norm()

    for q in range(4):
        for c in range(WAY):
            members = [y[i] for i in range(6) if LABELS[1, i] == c]
            members = [torch.stack(members).mean(0)] if head == "prototype" else members
            assert logits[1, q, c].item() == pytest.approx(-min(far(x[q], m).item() for m in members), abs=1e-7)


def test_only_class_means_take_more_classes():
    method = build(head="prototype")
    state = method.adapt(SUPPORT, LABELS)
    extended = method.extend(state, SUPPORT[:, :2] + 1, torch.tensor([[3, 4], [4, 3]]))
    assert torch.equal(method.classify(extended, QUERY)[..., :WAY], method.classify(state, QUERY))
    with pytest.raises(PipelineError, match="numbered from 3"):
        method.extend(state, SUPPORT[:, :2], torch.tensor([[2, 3], [3, 2]]))
    assert build(head="nearest").extend(state, SUPPORT[:, :2], torch.tensor([[3, 4], [4, 3]])) is None


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
@pytest.mark.parametrize("norm", [None, "running"])
def test_all_weights_by_torch(tasks, norm):
    labels = LABELS.where(LABELS >= 0, 2)
    method = build(conv=True, head="finetune_all", lr=0.5, lr_decay=0.1, norm=norm, tasks=tasks)
    before = copy.deepcopy(method.state_dict())
    with torch.inference_mode():
        logits = method.classify(method.adapt(SUPPORT, labels), QUERY)
    assert not method.embeds_once and all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    for t in range(2):
        weight, bias = initial_weights(WAY, method.backbone.out_features)
        network = Reference(method, weight, bias).train(norm is None)
        for step in range(15):
            network.zero_grad()
            F.cross_entropy(network(SUPPORT[t], "random"), labels[t]).backward()
            with torch.no_grad():
                for p in (*network.backbone.parameters(), *network.new.parameters()):
                    p -= 0.5 / (1 + 0.1 * step) * p.grad
        torch.testing.assert_close(logits[t], network.eval()(QUERY[t], "random").detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
@pytest.mark.parametrize("initialisation", ["dhillon", "features", "blog"])
@pytest.mark.parametrize(("entropy", "norm"), [("none", None), ("support", None), ("query", None), ("query", "batch")])
def test_support_initialised_by_torch(tasks, initialisation, entropy, norm):
    method = build(
        conv=True, head="support_initialised", initialisation=initialisation, entropy=entropy, entropy_weight=0.7,
        epochs=4, lr=0.01, norm=norm, tasks=tasks,
    )  # fmt: skip
    labels = LABELS if norm is None else LABELS.where(LABELS >= 0, 2)
    with torch.no_grad():
        state = method.adapt(SUPPORT, labels)
        logits = method.classify(state, QUERY)
    assert ("support" in state) is (entropy == "query")
    for t in range(2):
        with torch.no_grad():
            x = method.backbone(SUPPORT[t])
            x = {"dhillon": method.classifier(x).relu(), "features": x.relu(), "blog": x}[initialisation]
            weight = torch.stack([F.normalize(x[labels[t] == c].mean(0), dim=0) for c in range(WAY)])
        network = Reference(method, weight, torch.zeros(WAY)).train(norm == "batch")
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        given = labels[t] >= 0
        for _ in range(4):
            for term in ("fit", *([] if entropy == "none" else ["doubt"])):
                images = QUERY[t] if term == "doubt" and entropy == "query" else SUPPORT[t][given]
                p = network(images, initialisation)
                optimizer.zero_grad()
                if term == "fit":
                    F.cross_entropy(p, labels[t][given]).backward()
                else:
                    (0.7 * torch.distributions.Categorical(logits=p).entropy().mean()).backward()
                optimizer.step()
        torch.testing.assert_close(logits[t], network.eval()(QUERY[t], initialisation).detach(), rtol=0, atol=1e-7)


def test_only_query_entropy_makes_answers_depend_on_the_other_queries():
    for entropy in ("none", "support", "query"):
        method = build(conv=True, head="support_initialised", entropy=entropy, lr=0.01, epochs=3)
        state = method.adapt(SUPPORT, LABELS)
        alone = method.classify(state, QUERY[:, :1])
        change = (method.classify(state, QUERY)[:, :1] - alone).abs().max().item()
        assert change > 1e-4 if entropy == "query" else change < 1e-12


def test_entropy_and_hardness():
    logits, labels = 4 * draw(2, 5, WAY), torch.tensor([[0, 1, 2, 2, -1], [1, 1, 0, 2, 2]])
    p = logits.softmax(-1)
    odds = [[math.log((1 - p[t, q, c]) / p[t, q, c]) for q, c in enumerate(labels[t]) if c >= 0] for t in range(2)]
    found = hardness(logits, labels)
    assert found.tolist() == pytest.approx([sum(o) / len(o) for o in odds])
    entropies = -(p * p.log()).sum(-1)
    torch.testing.assert_close(mean_entropy(logits), entropies.mean(-1))
    counted = mean_entropy(logits, labels >= 0)
    assert counted[0].item() == pytest.approx(entropies[0, :4].mean().item())
    sure = torch.tensor([[800.0, 0.0], [-800.0, 0.0]])
    assert hardness(sure, torch.zeros(2, dtype=torch.long)).item() == 0 and mean_entropy(sure).item() == 0


@pytest.mark.parametrize(("classes", "scale", "expected"), [(200, None, 2.0), (201, None, 10.0), (5, 3.0, 3.0)])
def test_cosine_classifier_of_the_training_classes(classes, scale, expected):
    layer = Baseline(MLP((1, 8, 8), widths=[10]), classes, classifier="cosine", scale=scale).classifier
    with torch.no_grad():
        layer.length *= torch.rand(classes, 1)
    x = torch.randn(4, 10)
    cosines = F.cosine_similarity(x[:, None], layer.direction[None], dim=-1)
    torch.testing.assert_close(layer(x), expected * layer.length.T * cosines, rtol=1e-4, atol=1e-5)


def test_training_loss_with_smoothing_and_mixed_images():
    images, labels = draw(6, 1, 8, 8), torch.tensor([0, 1, 2, 6, 6, 3])
    method = build(classifier="cosine", label_smoothing=0.1, mixup=0.25)
    torch.manual_seed(3)
    loss, metrics = method(Images(images, labels))
    torch.manual_seed(3)
    share = torch.distributions.Beta(0.25, 0.25).sample().item()
    other = torch.randperm(6)
    logits = method.classifier(method.backbone(share * images + (1 - share) * images[other]))
    target = torch.full((CLASSES, CLASSES), 0.1 / 6, dtype=torch.float64).fill_diagonal_(0.9)
    target = share * target[labels] + (1 - share) * target[labels[other]]
    assert loss.item() == pytest.approx(-(target * logits.log_softmax(-1)).sum(-1).mean().item())
    assert metrics["accuracy"].item() == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


@pytest.mark.parametrize("head", ["linear", "cosine", "svm", "ridge", "finetune_all", "support_initialised"])
def test_training_and_adapting_improve_accuracy(head):
    """Classes are directions: those of training and two unseen ones."""
    torch.manual_seed(0)
    means = 2 * torch.randn(CLASSES + WAY, 1, 8, 8)
    options = {"lr": 0.05} if head != "support_initialised" else {"lr": 1e-3}
    method = Baseline(MLP((1, 8, 8), widths=[16]), CLASSES, head=head, **options)
    optimizer = torch.optim.Adam(method.parameters(), 1e-2)
    accuracies = []
    for _ in range(60):
        labels = torch.randint(CLASSES, (64,))
        loss, metrics = method(Images(means[labels] + torch.randn(64, 1, 8, 8), labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracies.append(metrics["accuracy"].item())
    assert accuracies[0] < 0.5 and accuracies[-1] > 0.95
    labels = torch.arange(WAY).repeat(2, 10)
    images = means[CLASSES:][labels] + torch.randn(2, 10 * WAY, 1, 8, 8)
    method.eval()
    with torch.no_grad():
        answers = method.classify(method.adapt(images[:, :WAY], labels[:, :WAY]), images).argmax(-1)
    assert (answers == labels).float().mean() > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "svn"}, "head='svn' is not known: choose one of linear"),
        ({"classifier": "cos"}, "choose one of linear, cosine"),
        ({"entropy": "queries"}, "choose one of query, support, none"),
        ({"initialisation": "x"}, "choose one of dhillon, features, blog"),
        ({"norm": "layer"}, "choose one of None, batch, running"),
        ({"distance": "dot"}, "choose one of squared_euclidean"),
        ({"epochs": 0}, "epochs=0, batch_size=4: there is at least one"),
        ({"label_smoothing": 1.0}, "in \\[0, 1\\)"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(PipelineError, match=message):
        build(**options)


def test_support_that_cannot_be_learnt_from():
    with pytest.raises(PipelineError, match="class 1 of 3 has no support"):
        build().adapt(SUPPORT[:1, :3], torch.tensor([[0, 2, 2]]))
