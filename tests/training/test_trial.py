"""What a network of another's makes of its method's training is said in one line, before anything starts."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.batch import Episodes
from pipeline.errors import PipelineError
from pipeline.model import build_model
from pipeline.training.prepare import prepare


class Plain(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.out_features, self.layer = 6, nn.Linear(shape[0] * shape[1] * shape[2], 6)

    def forward(self, x):
        return self.layer(x.flatten(1))


class Unused(Plain):
    def __init__(self, shape):
        super().__init__(shape)
        self.spare = nn.Linear(3, 3)


class Frozen(Plain):
    def __init__(self, shape):
        super().__init__(shape)
        self.requires_grad_(False)


class Failing(Plain):
    def forward(self, x):
        if self.training:
            raise ZeroDivisionError("in\ntwo lines")
        return super().forward(x)


class Branching(Plain):
    def forward(self, x):
        y = super().forward(x)
        return y if y.mean() > 0 else 2 * y


class Counting(Plain):
    def __init__(self, shape):
        super().__init__(shape)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        y = super().forward(x)
        self.mean += y.detach().mean(0)
        return y


class Recurrent(Plain):
    def __init__(self, shape):
        super().__init__(shape)
        self.lstm = nn.LSTM(shape[2], 6, batch_first=True)

    def forward(self, x):
        return self.lstm(x[:, 0])[0][:, -1] + super().forward(x)


class Spectral(Plain):
    def __init__(self, shape):
        super().__init__(shape)
        self.layer = nn.utils.parametrizations.spectral_norm(self.layer)


class Attending(Plain):
    def forward(self, x):
        rows = x[:, 0, :8, :8]
        return F.scaled_dot_product_attention(rows, rows * self.layer.weight.mean(), rows).mean(1)[
            :, :6
        ] + super().forward(x)


@pytest.fixture
def named(monkeypatch, tmp_path):
    """Arguments that choose one of the networks above."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return lambda network: ["backbone=module", f"backbone.path={__file__}", f"backbone.model={network.__name__}"]


def test_an_unused_parameter_is_named(small_run, named, capsys):
    prepare(small_run("prototypical", "cluster.workers=1", "name=one", *named(Unused)))
    assert "these parameters have no part in its loss: spare.weight, spare.bias" in capsys.readouterr().out
    with pytest.raises(PipelineError, match="spare.weight, spare.bias; several workers cannot train them"):
        prepare(small_run("prototypical", "cluster.workers=2", *named(Unused)))


@pytest.mark.parametrize(
    ("network", "method", "says"),
    [
        (
            Failing,
            "simple_shot",
            r"with method=simple_shot fails in a training step \(ZeroDivisionError: in two lines\)",
        ),
        (Frozen, "prototypical", "has nothing to train on backbone=module: set steps=0"),
    ],
)
def test_what_cannot_be_trained_is_refused(small_run, named, network, method, says):
    with pytest.raises(PipelineError, match=says) as caught:
        prepare(small_run(method, *named(network)))
    assert "\n" not in str(caught.value)
    prepare(small_run(method, "steps=0", *named(network)))


@pytest.mark.parametrize("network", [Plain, Branching, Counting, Recurrent, Spectral, Attending])
def test_second_order_maml_takes_the_loop_where_vmap_cannot(monkeypatch, network):
    monkeypatch.setitem(sys.modules, "networks_of_the_test", sys.modules[__name__])
    spec = {"method": {"name": "maml"}, "backbone": {"name": f"networks_of_the_test.{network.__name__}"}, "way": 2,
            "input": {"shape": [1, 9, 9], "scaling": "unit"}}  # fmt: skip
    torch.manual_seed(0)
    method = build_model(spec).train()
    labels = torch.arange(2).repeat(2, 2)
    batch = Episodes(torch.rand(2, 4, 1, 9, 9), labels, torch.rand(2, 4, 1, 9, 9), labels, labels[:, :2], 2)
    method(batch)[0].backward()
    assert all(p.grad is not None for p in method.parameters())
    assert method._mappable == (network in (Plain, Attending))
