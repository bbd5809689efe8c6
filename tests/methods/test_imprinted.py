from __future__ import annotations

import copy

import pytest
import torch

from pipeline.batch import Images
from pipeline.errors import PipelineError
from pipeline.evaluation.generalized import class_balanced
from pipeline.methods.imprinted import Imprinted, fine_tune
from pipeline.nets.conv4 import Conv4
from pipeline.nets.mlp import MLP

LABELS = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 1, 1]])


def build(classes=4, **options) -> Imprinted:
    torch.manual_seed(1)
    return Imprinted(Conv4((1, 8, 8), width=[3, 4]), classes, **options)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_weights_are_unit_from_the_start_and_after_every_step():
    method = build(head_lr_scale=10.0, embedding_dim=6)
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    for _ in range(3):
        torch.testing.assert_close(method.weight.norm(dim=1), torch.ones(4))
        optimizer.zero_grad()
        method(Images(images(8), torch.arange(8) % 4))[0].backward()
        optimizer.step()
        assert (method.weight.norm(dim=1) - 1).abs().max() > 1e-3
        method.after_step()


def test_parameter_groups_cover_every_parameter_once():
    method = build(head_lr_scale=10.0, embedding_dim=6)
    groups = list(method.parameter_groups())
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in method.parameters())
    assert [g["lr_scale"] for g in groups] == [1.0, 10.0]
    assert {id(p) for p in method.backbone.parameters()} == {id(p) for p in groups[0]["params"]}
    assert method.classes == 4 and method.weight.shape == (4, 6) and build().weight.shape == (4, 16)


def test_loss_is_the_cosine_softmax():
    method = build(scale=5.0, learn_scale=False).double().eval()
    method.after_step()  # unit to float64's precision
    x, labels = images(6).double(), torch.tensor([0, 1, 2, 3, 3, 0])
    losses = []
    for image, label in zip(x, labels, strict=True):
        e = method.backbone(image[None])[0]
        logits = torch.stack([5.0 * (e @ w) / e.norm() / w.norm() for w in method.weight])
        losses.append(-logits.log_softmax(0)[label])
    loss, metrics = method(Images(x, labels))
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-8)
    assert not method.scale.requires_grad


def test_joint_state_is_base_then_novel_and_extend_touches_no_class():
    method = build().eval()
    novel, joint = method.adapt(images(2, 5), LABELS), method.joint_state(images(2, 5), LABELS)
    assert novel["weights"].shape == (2, 2, 16) and joint["weights"].shape == (2, 6, 16)
    assert torch.equal(joint["weights"][:, 4:], novel["weights"])
    assert torch.equal(joint["weights"][1, :4], method.weight)
    extended = method.extend(joint, images(2, 3) + 1, torch.tensor([[6, 7, 6], [7, 6, 6]]))
    query = images(2, 9)
    assert extended["weights"].shape == (2, 8, 16)
    assert torch.equal(method.classify(extended, query)[..., :6], method.classify(joint, query))
    with pytest.raises(PipelineError, match="numbered from 6"):
        method.extend(joint, images(2, 3), torch.tensor([[5, 6, 6], [6, 6, 6]]))


def test_refresh_moves_only_what_it_saw():
    method = build().eval()
    state = method.adapt(images(1, 5), LABELS[:1])
    moved = method.refresh(state, images(1, 2) + 1, torch.tensor([[1, 1]]), rate=0.25)
    assert torch.equal(moved["weights"][:, 0], state["weights"][:, 0])
    new = method.adapt(images(1, 2) + 1, torch.tensor([[0, 0]]))["weights"][0, 0]
    mixed = 0.75 * state["weights"][0, 1] + 0.25 * new
    torch.testing.assert_close(moved["weights"][0, 1], mixed / mixed.norm())


def two_classes(count: int, seed: int, offset: int = 0) -> Images:
    """Images of classes told apart by which quarter is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    for i, label in enumerate(labels.tolist()):
        row, column = divmod(label, 2)
        x[i, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.5
    return Images(x, labels)


def test_training_imprinting_and_fine_tuning_the_joint_classifier():
    torch.manual_seed(0)
    method = Imprinted(MLP((1, 8, 8), widths=[32]), classes=2)
    data = two_classes(600, seed=1)
    base, novel = data.labels < 2, data.labels >= 2
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
    for step in range(60):
        rows = base.nonzero().squeeze(1)[torch.arange(step * 32, step * 32 + 32) % int(base.sum())]
        optimizer.zero_grad()
        method(Images(data.images[rows], data.labels[rows]))[0].backward()
        optimizer.step()
        method.after_step()
    method.eval()
    support = novel.nonzero().squeeze(1)[:10]
    state = method.joint_state(data.images[support][None], data.labels[support][None] - 2)
    test = two_classes(400, seed=2)

    def accuracy(model: Imprinted, weights: torch.Tensor) -> float:
        logits = model.classify({"weights": weights[None]}, test.images[None])[0]
        return (logits.argmax(-1) == test.labels).float().mean().item()

    imprinted = accuracy(method, state["weights"][0])
    before = copy.deepcopy(method.state_dict())
    joint = method.with_classes(state)
    rows = torch.cat([base.nonzero().squeeze(1), support])
    labels = data.labels[rows]
    batches = (Images(data.images[rows[i]], labels[i]) for i in class_balanced(labels, 32, 60, seed=0))
    fine_tune(joint, batches, lr=0.02, decay_every=20)
    assert accuracy(joint, joint.weight) > max(imprinted, 0.6)
    torch.testing.assert_close(joint.weight.norm(dim=1), torch.ones(4))
    assert not joint.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), method.state_dict().values(), strict=True))


def test_fine_tuning_lowers_the_rate():
    """With a constant gradient the distances walked show the learning rates."""

    class Line(Imprinted):
        def loss(self, batch):
            return self.scale.sum(), {}

        def after_step(self):
            walked.append(self.scale.item())

    walked: list[float] = []
    model = Line(MLP((1, 8, 8)), classes=2).double()
    fine_tune(
        model, [Images(images(1), LABELS[0, :1])] * 5, lr=1.0, momentum=0, weight_decay=0, lr_decay=0.5, decay_every=2
    )
    steps = [10.0 - walked[0], *(a - b for a, b in zip(walked, walked[1:], strict=False))]
    assert steps == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_a_joint_classifier_is_of_one_task():
    method = build().eval()
    with pytest.raises(PipelineError, match="one task"):
        method.with_classes(method.adapt(images(2, 5), LABELS))
