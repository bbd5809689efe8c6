from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.errors import PipelineError
from pipeline.nets import build_backbone


@pytest.mark.parametrize(
    ("shape", "options", "features"),
    [
        ((1, 28, 28), {}, 64),
        ((3, 84, 84), {}, 1600),
        ((3, 84, 84), {"width": 32}, 800),
        ((1, 28, 28), {"strided": True}, 64),
        ((3, 32, 32), {"width": [8, 16]}, 16 * 64),
        ((3, 33, 20), {"width": 2}, 2 * 2 * 1),
        ((3, 84, 84), {"width": 32, "same_padding": True}, 32 * 6 * 6),
        ((1, 28, 28), {"strided": True, "average": False}, 256),
        ((1, 28, 28), {"width": 8, "same_padding": True, "average": True}, 8),
    ],
)
def test_conv4_features(shape, options, features):
    backbone = build_backbone({"name": "conv4", **options}, shape)
    assert backbone.out_features == features
    assert backbone(torch.rand(3, *shape)).shape == (3, features)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_conv4_by_definition(strided, channels_last, training):
    """Convolution, batch-norm, ReLU, pooling in the paper's order, in float64."""
    torch.manual_seed(0)
    net = build_backbone({"name": "conv4", "width": 3, "strided": strided, "channels_last": channels_last}, (2, 20, 17))
    net = net.double().train(training)
    images = torch.randn(4, 2, 20, 17, dtype=torch.float64)
    x = images
    for conv, norm in zip(net.convs, net.norms, strict=True):
        x = F.conv2d(x, conv.weight, stride=2 if strided else 1, padding=1)
        mean = x.mean((0, 2, 3), keepdim=True) if training else torch.zeros(1).double()
        var = x.var((0, 2, 3), keepdim=True, correction=0) if training else torch.ones(1).double()
        x = F.relu((x - mean) / (var + 1e-5).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1))
        if not strided:
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    expected = x.mean((2, 3)) if strided else x.reshape(4, -1)
    torch.testing.assert_close(net(images), expected, rtol=0, atol=1e-10)


def test_same_padding_never_drops_the_last_row():
    net = build_backbone({"name": "conv4", "width": [1], "same_padding": True}, (1, 5, 5)).eval()
    torch.nn.init.dirac_(net.convs[0].weight)
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 4, 4] = 7.0
    torch.testing.assert_close(net(image)[0, -1].item(), 7.0, rtol=1e-4, atol=0)
    assert net(image).shape == (1, 9)


def test_conv4_under_vmap_is_every_task_alone():
    net = build_backbone({"name": "conv4", "width": 4, "norm": "batch_statistics"}, (1, 16, 16)).double()
    tasks = torch.randn(3, 5, 1, 16, 16, dtype=torch.float64)
    alone = torch.stack([net(task) for task in tasks])
    torch.testing.assert_close(torch.func.vmap(net)(tasks), alone, rtol=0, atol=1e-10)


def test_initialisations():
    torch.manual_seed(0)
    shape = (64, 16, 16)
    usual = build_backbone({"name": "conv4"}, shape).convs[0].weight.detach()
    xavier = build_backbone({"name": "conv4", "init": "xavier"}, shape).convs[0].weight.detach()
    assert float(usual.abs().max()) == pytest.approx((64 * 9) ** -0.5, rel=0.01)
    assert float(xavier.abs().max()) == pytest.approx((6 / (2 * 64 * 9)) ** 0.5, rel=0.01)


def test_two_runs_are_bitwise_equal():
    def step():
        torch.manual_seed(3)
        net = build_backbone({"name": "conv4", "width": 8}, (3, 32, 32))
        net(torch.rand(16, 3, 32, 32)).square().sum().backward()
        return [p.grad for p in net.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


class OwnBackbone(nn.Module):
    def __init__(self, shape, width: int) -> None:
        super().__init__()
        self.out_features, self.shape = width, shape


class WithoutWidth(nn.Module):
    pass


def test_own_backbone_by_import_path(monkeypatch):
    monkeypatch.setitem(sys.modules, "own_backbones", sys.modules[__name__])
    net = build_backbone({"name": "own_backbones.OwnBackbone", "width": 5}, (1, 2, 3))
    assert isinstance(net, OwnBackbone) and net.out_features == 5 and net.shape == (1, 2, 3)
    with pytest.raises(PipelineError, match="out_features"):
        build_backbone({"name": "own_backbones.WithoutWidth"}, (1, 2, 3))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "conv5"}, "choose one of conv4, "),
        ({"name": "norm"}, "choose one of conv4, "),
        ({"name": "../conv4"}, "unknown backbone"),
        ({"name": None}, "unknown backbone"),
        ({}, "unknown backbone"),
        ({"name": "os.system"}, "not a subclass"),
        ({"name": "no.such.module"}, "cannot be imported"),
        ({"name": "conv4", "widht": 3}, "no option widht: its options are width, strided"),
        ({"name": "conv4", "shape": [1, 2, 3]}, "no option shape"),
        ({"name": "conv4", "norm": "layer"}, "norm='layer' is not known: choose one of batch, batch_statistics"),
        ({"name": "conv4", "affine": "both"}, "affine"),
        ({"name": "conv4", "init": "zeros"}, "init"),
        ({"name": "conv4", "width": [4] * 6}, "resize them to at least 64x64"),
    ],
)
def test_refusals_are_one_line(spec, message):
    with pytest.raises(PipelineError) as caught:
        build_backbone(spec, (1, 28, 28))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_conv4_with_leaky_relu():
    """Slopes before pooling, as MAML++'s network has them."""
    torch.manual_seed(0)
    net = build_backbone({"name": "conv4", "width": [3, 4], "negative_slope": 0.01}, (2, 8, 8)).double()
    x = images = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    for conv, norm in zip(net.convs, net.norms, strict=True):
        x = F.max_pool2d(F.leaky_relu(norm(conv(x)), 0.01), 2)
    torch.testing.assert_close(net(images), x.flatten(1), rtol=0, atol=1e-12)
    net.negative_slope = 0.0
    assert (net(images) - x.flatten(1)).abs().max() > 1e-3
