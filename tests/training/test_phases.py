"""A method with two phases: each has its turns and an optimizer of its own, whose moments are kept."""

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
    phases = ("auxiliary", "loss")

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__(backbone)
        self.head = nn.Linear(int(backbone.out_features), classes)
        self.turns: list[str] = []

    def runs(self, phase: str, step: int, steps: int, draw: float) -> bool:
        assert 0 <= draw < 1 and step < steps
        return phase == "loss" or step % 3 == 0

    def auxiliary(self, batch: Images):
        self.turns.append("auxiliary")
        logits = self.head(self.backbone(batch.images))
        return cross_entropy(logits, batch.labels), {"accuracy": accuracy(logits, batch.labels)}

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


def test_phases_take_turns_and_are_logged(small_run, method):
    run = learn(own(small_run, method))
    assert run.method.turns == ["auxiliary", "loss", "loss", "loss"] * 4
    entry = next(e for e in run.history if "train/loss" in e)
    assert {"train/accuracy", "train/auxiliary_loss", "train/auxiliary_accuracy"} <= entry.keys()
    assert entry["train/auxiliary_loss"] > 1.5  # of 12 or more classes, the mean over the turns it had
    moments = {phase: optimizer.state_dict()["state"] for phase, optimizer in run.optimizers.items()}
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


def test_the_draw_is_the_same_for_all_workers(small_run, method, monkeypatch):
    seen = []
    monkeypatch.setattr(CoTrained, "runs", lambda self, phase, step, steps, draw: seen.append(draw) or True)
    learn(own(small_run, method, "steps=3", "validation.every=3"))
    first = list(seen)
    seen.clear()
    torch.manual_seed(1)
    learn(own(small_run, method, "steps=3", "validation.every=3"))
    assert seen == first and len(set(first)) == 6
