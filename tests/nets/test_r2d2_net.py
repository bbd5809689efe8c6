"""R2-D2's network in both its forms, by definition in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.nets import build_backbone

SMALL = {"name": "r2d2_net", "widths": [3, 4, 5, 6], "dropout": 0.0}


def maxima(x, stride):
    return x.unfold(2, 2, stride).unfold(3, 2, stride).amax((-1, -2))


@pytest.mark.parametrize("variant", ["r2d2", "metaopt"])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_by_definition(variant, channels_last, bias):
    torch.manual_seed(0)
    spec = {**SMALL, "variant": variant, "channels_last": channels_last, "bias": bias}
    net = build_backbone(spec, (2, 33, 20)).double()
    images = torch.randn(4, 2, 33, 20, dtype=torch.float64)
    x, maps = images, []
    for number, (conv, norm) in enumerate(zip(net.convs, net.norms, strict=True)):
        x = F.conv2d(x, conv.weight, conv.bias, padding=1)
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        x = maxima(
            x * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1), 1 if number == 3 and variant == "r2d2" else 2
        )
        x = x if number == 3 and variant == "metaopt" else torch.where(x > 0, x, 0.1 * x)
        maps.append(x)
    third = maxima(maps[2], 1) if variant == "r2d2" else maps[2]
    expected = torch.cat([third.reshape(4, -1), maps[3].reshape(4, -1)], 1)
    found = net(images)
    assert found.shape == (4, net.out_features)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "options", "features"),
    [
        ((3, 84, 84), {}, 31104 + 41472),
        ((3, 84, 84), {"variant": "metaopt"}, 51200),
        ((3, 32, 32), {}, 384 * 9 + 512 * 9),
        ((1, 28, 28), {"widths": [64] * 4}, 64 * 4 * 2),
    ],
)
def test_features(shape, options, features):
    with torch.device("meta"):
        net = build_backbone({"name": "r2d2_net", **options}, shape)
        assert net.out_features == features and net(torch.zeros(2, *shape)).shape == (2, features)


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({}, (0.1, 0.1)),
        ({"variant": "metaopt"}, (0.1, 0.3)),
        ({"dropout": 0.4}, (0.4, 0.4)),
        ({"variant": "metaopt", "dropout": [0.2, 0]}, (0.2, 0)),
    ],
)
def test_dropout_of_the_last_two_blocks(options, rates):
    torch.manual_seed(0)
    net = build_backbone({**SMALL, "widths": [2, 2, 40, 40], "dropout": None, **options}, (1, 48, 48))
    found = net(torch.rand(20, 1, 48, 48))
    third = net.out_features - (40 * 25 if net.original else 40 * 9)
    zeros = [(part == 0).double().mean().item() for part in (found[:, :third], found[:, third:])]
    # of a maximum over 2x2 values, all four must be dropped, or the rest be negative: too rare to count
    assert zeros[1] == pytest.approx(rates[1], abs=0.02)
    assert zeros[0] == pytest.approx(rates[0], abs=0.02) or net.original
    assert torch.equal(net.eval()(torch.ones(2, 1, 48, 48)), net(torch.ones(2, 1, 48, 48)))
