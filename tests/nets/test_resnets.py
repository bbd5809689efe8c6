"""ResNet-12 of MetaOptNet and of TADAM, WRN-28-10: by their definitions, in float64, and their published sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import PipelineError
from pipeline.nets import build_backbone


def trained_like(net):
    """Parameters and running averages that no initialisation makes alike."""
    generator = torch.Generator().manual_seed(1)
    net = net.double()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1:
                low = -0.5 if name.endswith(("bias", "mean")) else 0.5
                tensor.uniform_(low, low + 1, generator=generator)
    return net


def normalise(norm, x, training: bool):
    mean = x.mean((0, 2, 3)) if training else norm.running_mean
    var = x.var((0, 2, 3), correction=0) if training else norm.running_var
    out = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + norm.eps).sqrt()
    return out * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


def residual_block(block, x, activation, training):
    h = activation(normalise(block.norms[0], F.conv2d(x, block.convs[0].weight, padding=1), training))
    h = activation(normalise(block.norms[1], F.conv2d(h, block.convs[1].weight, padding=1), training))
    h = normalise(block.norms[2], F.conv2d(h, block.convs[2].weight, padding=1), training)
    return activation(h + normalise(block.shortcut_norm, F.conv2d(x, block.shortcut.weight), training))


def pool_same(x):
    """2x2 maxima; what lies beyond an odd edge is less than everything."""
    x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), value=-torch.inf)
    return x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))


IMAGES = torch.randn(3, 2, 37, 34, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_resnet12(training, channels_last, average):
    spec = {"name": "resnet12", "widths": [3, 4, 5, 6], "drop": 0.0}
    net = build_backbone({**spec, "channels_last": channels_last, "average": average}, (2, 37, 34))
    net = trained_like(net).train(training)
    x = IMAGES
    for block in net.blocks:
        x = residual_block(block, x, lambda v: torch.maximum(v, 0.1 * v), training)
        x = x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2].unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    expected = x.mean((2, 3)) if average else x.reshape(3, -1)
    found = net(IMAGES)
    assert found.shape == (3, net.out_features)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("pools", [2, 3, 4])
def test_resnet12_of_tadam(training, channels_last, pools):
    spec = {"name": "resnet12_tadam", "widths": [3, 4, 5, 6], "num_max_pools": pools, "channels_last": channels_last}
    net = trained_like(build_backbone(spec, (2, 37, 34))).train(training)
    x = IMAGES
    for number, block in enumerate(net.blocks):
        assert block.norms[0].eps == 1e-3
        x = residual_block(block, x, lambda v: v * torch.sigmoid(v), training)
        x = pool_same(x) if number < pools else x
    found = net(IMAGES)
    assert found.shape == (3, net.out_features)
    torch.testing.assert_close(found, x.mean((2, 3)), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("pools", "side"), [(3, 11), (4, 6)])
def test_tadam_pools_as_tensorflow(pools, side):
    """84 -> 42 -> 21 -> 11 with three poolings, 6 with four."""
    spec = {"name": "resnet12_tadam", "widths": [1, 1, 1, 1, 1], "num_max_pools": pools}
    net = build_backbone(spec, (3, 84, 84))  # a fifth block sees what is left of the fourth
    seen = []
    net.blocks[4].register_forward_hook(lambda _, __, out: seen.append(out.shape[-2:]))
    net(torch.rand(2, 3, 84, 84))
    assert seen == [(side, side)]


def test_running_averages_keep_95_of_100():
    net = build_backbone({"name": "resnet12_tadam", "widths": [2], "num_max_pools": 1}, (1, 8, 8))
    x = torch.rand(4, 1, 8, 8)
    mean = F.conv2d(x, net.blocks[0].shortcut.weight).mean((0, 2, 3))
    net(x)
    torch.testing.assert_close(net.blocks[0].shortcut_norm.running_mean, 0.05 * mean)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_wide_resnet(training, channels_last):
    spec = {"name": "wrn28", "depth": 16, "widen": 1, "channels_last": channels_last}
    net = trained_like(build_backbone(spec, (2, 9, 12))).train(training)
    images = IMAGES[:, :, :9, :12]
    x = F.conv2d(images, net.first.weight, padding=1)
    assert [b.convs[0].stride[0] for b in net.blocks] == [1, 1, 2, 1, 2, 1]
    for block in net.blocks:
        stride = block.convs[0].stride[0]
        h = normalise(block.norms[0], x, training).relu()
        x = x if block.shortcut is None else F.conv2d(h, block.shortcut.weight, stride=stride)
        h = F.conv2d(h, block.convs[0].weight, stride=stride, padding=1)
        x = x + F.conv2d(normalise(block.norms[1], h, training).relu(), block.convs[1].weight, padding=1)
    assert x.shape[1:] == (64, 3, 3)
    expected = normalise(net.norm, x, training).relu().mean((2, 3))
    torch.testing.assert_close(net(images), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("spec", "shape", "parameters", "features"),
    [
        # 12.4 million (MetaOptNet); 3x3 and 1x1 kernels, and gain and bias of four batch-norms a block
        (
            {"name": "resnet12"},
            (3, 84, 84),
            sum(9 * i * o + 2 * 9 * o * o + i * o + 8 * o for i, o in ((3, 64), (64, 160), (160, 320), (320, 640))),
            16000,
        ),
        ({"name": "resnet12", "average": True}, (3, 84, 84), 12_424_320, 640),
        (
            {"name": "resnet12_tadam"},
            (3, 84, 84),
            sum(9 * i * o + 2 * 9 * o * o + i * o + 8 * o for i, o in ((3, 64), (64, 128), (128, 256), (256, 512))),
            512,
        ),
        # 36,479,194 with the classifier of ten classes for CIFAR-10 (Zagoruyko & Komodakis: 36.5 million)
        ({"name": "wrn28"}, (3, 32, 32), 36_479_194 - 6_410, 640),
        # WRN-40-4: 8.9 million
        ({"name": "wrn28", "depth": 40, "widen": 4}, (3, 32, 32), 8_949_210 - 2_570, 256),
    ],
)
def test_published_sizes(spec, shape, parameters, features):
    with torch.device("meta"):
        net = build_backbone(spec, shape)
        assert net(torch.zeros(2, *shape)).shape == (2, features)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net.out_features == features


def test_initial_variances():
    torch.manual_seed(0)
    for spec, variance in (
        ({"name": "resnet12", "widths": [64, 64]}, 2),
        ({"name": "resnet12_tadam", "widths": [64, 64], "num_max_pools": 2}, 0.1 * 2),
        ({"name": "wrn28", "depth": 10, "widen": 4}, 2),
    ):
        net = build_backbone(spec, (3, 32, 32))
        for conv in (m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.weight.numel() > 3000):
            fan_out = conv.out_channels * conv.kernel_size[0] ** 2
            assert conv.weight.var().item() == pytest.approx(variance / fan_out, rel=0.1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "resnet12"}, "halves images of 12x40 to nothing: resize them to at least 16x16"),
        ({"name": "resnet12", "widths": [4, 4], "drop": 1.5}, "drop=1.5"),
        ({"name": "resnet12", "widths": [4, 4], "drop_size": 0}, "drop_size=0"),
        ({"name": "resnet12_tadam", "num_max_pools": 5}, "num_max_pools=5: give a number of 0..4"),
        ({"name": "wrn28", "depth": 27}, "depth=27"),
        ({"name": "wrn28", "dropout": 1.0}, "dropout=1.0"),
        ({"name": "r2d2_net"}, "pools images of 12x40 to nothing: resize them to at least 16x16"),
        ({"name": "r2d2_net", "variant": "r2d3"}, "variant='r2d3' is not known: choose one of r2d2, metaopt"),
        ({"name": "r2d2_net", "widths": [64, 64]}, "widths=[64, 64]: r2d2_net has four blocks"),
        ({"name": "r2d2_net", "dropout": [0.1, 0.2, 0.3]}, "dropout=[0.1, 0.2, 0.3]"),
        ({"name": "resnet12", "width": 3}, "no option width: its options are widths"),
    ],
)
def test_refusals_are_one_line(spec, message):
    with pytest.raises(PipelineError) as caught:
        build_backbone(spec, (3, 12, 40))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [{"name": "resnet12_tadam", "widths": [2, 3], "num_max_pools": 2}, {"name": "wrn28", "depth": 10, "widen": 1}],
)
def test_smallest_images(spec):
    net = build_backbone(spec, (1, 1, 1)).eval()
    assert net(torch.rand(2, 1, 1, 1)).isfinite().all()
