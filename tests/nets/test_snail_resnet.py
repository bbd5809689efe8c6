from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import PipelineError
from pipeline.nets import build_backbone

SMALL = {"name": "snail_resnet", "widths": [3, 4], "middle": 5, "features": 6}


def test_published_shape():
    net = build_backbone({"name": "snail_resnet"}, (3, 84, 84)).eval()
    assert net.out_features == 384 and net(torch.rand(1, 3, 84, 84)).shape == (1, 384)
    x = torch.rand(1, 3, 84, 84)
    for block in net.blocks:
        x = block(x)
    assert x.shape == (1, 256, 6, 6)


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("training", [True, False])
def test_by_definition(pool, training):
    torch.manual_seed(0)
    net = build_backbone({**SMALL, "pool": pool, "dropout": 0.0}, (2, 9, 10)).double().train(training)
    images = torch.randn(3, 2, 9, 10, dtype=torch.float64)
    x = images
    for block in net.blocks:
        y = x
        for conv, norm in zip(block.convs, block.norms, strict=True):
            y = F.conv2d(y, conv.weight, padding=1)
            mean = y.mean((0, 2, 3), keepdim=True) if training else 0.0
            var = y.var((0, 2, 3), keepdim=True, correction=0) if training else torch.ones(()).double()
            y = (y - mean) / (var + 1e-5).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
            y = torch.where(y > 0, y, 0.1 * y)
        y = y + F.conv2d(x, block.shortcut.weight)
        y = F.pad(y, (0, y.shape[3] % 2, 0, y.shape[2] % 2), value=-torch.inf)
        x = y.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    x = F.conv2d(x, net.expand.weight[..., None, None])
    x = x.mean((2, 3)) if pool == "mean" else x.amax((2, 3))
    expected = F.relu(x) @ net.project.weight.T
    torch.testing.assert_close(net(images), expected, rtol=0, atol=1e-10)


def test_dropout_in_training_only():
    net = build_backbone(SMALL, (1, 8, 8))
    images = torch.rand(2, 1, 8, 8)
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))


def test_unknown_pool():
    with pytest.raises(PipelineError, match="choose one of mean, max"):
        build_backbone({**SMALL, "pool": "sum"}, (1, 8, 8))
