"""A method with an auxiliary loss on images: it has its turns and an optimizer of its own, whose moments are kept."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from pipeline.batch import Images
from pipeline.errors import PipelineError
from pipeline.functional.losses import accuracy, cross_entropy
from pipeline.methods.prototypical import Prototypical

from .test_loop import assert_same, learn


class CoTrained(Prototypical):
    """Prototypes, and in every third step a classifier over all training classes."""

    regime = "both"

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__(backbone)
        self.head = nn.Linear(int(backbone.out_features), classes)
        self.turns: list[str] = []

    def auxiliary_probability(self, step: int, steps: int) -> float:
        assert step < steps
        return float(step % 3 == 0)

    def auxiliary_loss(self, images: Images):
        self.turns.append("auxiliary")
        logits = self.head(self.backbone(images.images))
        return cross_entropy(logits, images.labels), {"accuracy": accuracy(logits, images.labels)}

    def loss(self, batch):
        self.turns.append("loss")
        return super().loss(batch)


@pytest.fixture
def method(monkeypatch) -> str:
    monkeypatch.setitem(sys.modules, "own_methods", sys.modules[__name__])
    return "own_methods.CoTrained"


def own(small_run, method: str, *overrides: str) -> dict:
    raw = small_run("prototypical", "train.batch_size=24", *overrides)
    return {**raw, "method": {"name": method}}


def test_the_losses_take_turns_and_are_logged(small_run, method):
    run = learn(own(small_run, method))
    assert run.method.turns == ["auxiliary", "loss", "loss", "loss"] * 4
    entry = next(e for e in run.history if "train/loss" in e)
    assert {"train/accuracy", "train/auxiliary_loss", "train/auxiliary_accuracy"} <= entry.keys()
    assert entry["train/auxiliary_loss"] > 1.5  # of 12 or more classes, the mean over the turns it had
    moments = {name: optimizer.state_dict()["state"] for name, optimizer in run.optimizers.items()}
    head = [n for n, (name, _) in enumerate(run.method.named_parameters()) if name.startswith("head.")]
    assert set(head) <= moments["auxiliary"].keys() and not set(head) & moments["loss"].keys()
    assert int(next(iter(moments["auxiliary"].values()))["step"]) == 4


def test_resumed_equals_uninterrupted(small_run, method, tmp_path):
    whole = learn(own(small_run, method))
    learn(own(small_run, method), stop_at=8, folder=tmp_path / "checkpoint")
    assert_same(whole, learn(own(small_run, method), start=str(tmp_path / "checkpoint")))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.grouping=[2,5]"], r"train\.batch_size=24 cannot be shared equally by .* in groups of 2 x 5 images"),
        (["train.grouping=[2,1]"], r"train\.grouping"),
        (["train.grouping=[1000,2]", "train.batch_size=4000"], r"train\.grouping=\(1000, 2\): split 'train' has only"),
        (["train.grouping=[1,30]", "train.batch_size=120"], r"the smallest class of split 'train' has only"),
    ],
)
def test_groups_that_cannot_be_are_refused(small_run, method, overrides, message):
    with pytest.raises(PipelineError, match=message):
        learn(own(small_run, method, *overrides))


def test_the_turns_are_drawn_by_the_seed_alone(small_run, method, monkeypatch):
    """Whatever else was drawn before, and whichever worker asks."""
    monkeypatch.setattr(CoTrained, "auxiliary_probability", lambda self, step, steps: 0.5)
    first = learn(own(small_run, method)).method.turns
    torch.manual_seed(1)
    assert learn(own(small_run, method)).method.turns == first
    assert 12 < len(first) < 24 and learn(own(small_run, method, "seed=4")).method.turns != first


def test_co_training_is_what_it_was(small_run):
    """Figures of the first release's code: the same turns, episodes, images and order of the optimizers."""
    plain = ["method.conditioning=false", "backbone=mlp", "optimizer=sgd", "optimizer.lr=0.01", "steps=6"]
    run = learn(small_run("tadam", *plain))
    losses = [[entry[key] for key in ("train/loss", "train/auxiliary_loss") if key in entry] for entry in run.history]
    assert losses == [pytest.approx([1.2255393, 4.1276841], rel=1e-4), pytest.approx([0.9963005], rel=1e-4), []]
    norms = {name: float(value.norm()) for name, value in run.method.state_dict().items()}
    expected = {
        "scale": 7.5,
        "backbone.layers.0.weight": 4.6613665,
        "backbone.layers.0.bias": 0.1628754,
        "classifier.weight": 7.8649606,
        "classifier.bias": 0.0040907,
    }
    assert norms == pytest.approx(expected, rel=1e-3)
