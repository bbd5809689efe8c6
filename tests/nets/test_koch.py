from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import PipelineError
from pipeline.methods.siamese import Siamese
from pipeline.nets import build_backbone


def test_sizes_of_the_paper():
    net = build_backbone({"name": "koch"}, (1, 105, 105))
    assert net.out_features == 4096 and net.top.weight.shape == (4096, 9216)
    sizes = [tuple(conv.weight.shape) for conv in net.convs]
    assert sizes == [(64, 1, 10, 10), (128, 64, 7, 7), (128, 128, 4, 4), (256, 128, 4, 4)]
    assert sum(p.numel() for p in net.parameters()) == 38_947_648


@pytest.mark.parametrize("channels_last", [True, False])
def test_by_definition(channels_last):
    torch.manual_seed(0)
    net = build_backbone({"name": "koch", "features": 5, "channels_last": channels_last}, (2, 66, 70)).double()
    images = torch.randn(2, 2, 66, 70, dtype=torch.float64)
    x = images
    for number, conv in enumerate(net.convs):
        x = F.relu(F.conv2d(x, conv.weight, conv.bias))
        if number < 3:
            x = x[..., : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    expected = torch.sigmoid(x.flatten(1) @ net.top.weight.T + net.top.bias)
    torch.testing.assert_close(net(images), expected, rtol=0, atol=1e-10)


def test_initial_weights():
    torch.manual_seed(0)
    net = build_backbone({"name": "koch", "features": 512}, (1, 105, 105))
    for conv in net.convs:
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert net.top.weight.std().item() == pytest.approx(0.2, rel=0.01)
    biases = torch.cat([layer.bias for layer in (*net.convs, net.top)])
    assert biases.mean().item() == pytest.approx(0.5, abs=0.002) and biases.std().item() == pytest.approx(0.01, rel=0.1)
    torch_like = build_backbone({"name": "koch", "features": 5, "init": "torch"}, (1, 65, 65))
    assert torch_like.convs[1].weight.abs().max().item() == pytest.approx((64 * 49) ** -0.5, rel=0.01)


def test_in_a_siamese_network():
    torch.manual_seed(0)
    method = Siamese(build_backbone({"name": "koch", "features": 8}, (1, 65, 65))).eval()
    state = method.adapt(torch.rand(1, 3, 1, 65, 65), torch.arange(3)[None])
    assert method.classify(state, torch.rand(1, 2, 1, 65, 65)).shape == (1, 2, 3)


def test_refusals():
    with pytest.raises(PipelineError, match="at least 65x65"):
        build_backbone({"name": "koch"}, (1, 64, 105))
    with pytest.raises(PipelineError, match="choose one of koch, torch"):
        build_backbone({"name": "koch", "init": "zeros"}, (1, 105, 105))
