"""Modulation by the task: by definition in every backbone that has it; the network that makes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.nets import build_backbone
from pipeline.nets.film import film_of, modulate
from pipeline.nets.norm import batch_norms
from pipeline.nets.task_embedding import TaskEmbedding

BACKBONES = {
    "conv4": {"width": [3, 4]},
    "resnet12": {"widths": [3, 4], "drop": 0.0},
    "resnet12_tadam": {"widths": [3, 4], "num_max_pools": 1},
    "r2d2_net": {"widths": [3, 4, 5, 6], "dropout": 0.0},
    "wrn28": {"depth": 10, "widen": 1},
}


def build(name: str, **options):
    torch.manual_seed(0)
    return build_backbone({"name": name, **BACKBONES[name], **options}, (2, 17, 20)).double()


@pytest.mark.parametrize("channels_last", [True, False])
def test_modulate(channels_last):
    h = torch.randn(5, 3, 4, 6, dtype=torch.float64)
    h = h.to(memory_format=torch.channels_last) if channels_last else h
    gamma, beta = torch.randn(2, 5, 3, dtype=torch.float64)
    pairs = iter([(gamma, beta)])
    out = modulate(h, pairs)
    expected = torch.stack(
        [torch.stack([(1 + gamma[n, c]) * h[n, c] + beta[n, c] for c in range(3)]) for n in range(5)]
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert out.is_contiguous(memory_format=torch.channels_last) is channels_last
    assert modulate(h, pairs) is h
    half = modulate(h.bfloat16(), iter([(gamma.float(), beta.float())]))
    assert half.dtype == torch.bfloat16


def test_every_image_gets_the_modulation_of_its_task():
    gamma, beta = torch.randn(2, 3, 7)
    film = film_of(gamma, beta, [3, 4], images=5)
    assert [tuple(g.shape) for g, _ in film] == [(15, 3), (15, 4)]
    for n in range(15):
        torch.testing.assert_close(torch.cat([g[n] for g, _ in film]), gamma[n // 5])
        torch.testing.assert_close(torch.cat([b[n] for _, b in film]), beta[n // 5])


@pytest.mark.parametrize("name", BACKBONES)
def test_modulation_is_an_affine_map_after_batch_norm(name):
    """So the same for all images, it can be folded into batch-norm's gain and bias; shortcuts have none."""
    net = build(name)
    layers = [layer for key, layer in batch_norms(net).items() if "shortcut" not in key]
    layers = layers if name != "wrn28" else sorted(layers, key=lambda layer: layer is net.norm)
    assert tuple(layer.channels for layer in layers) == net.film_widths
    images = torch.randn(6, 2, 17, 20, dtype=torch.float64)
    film = [torch.randn(2, 1, width, dtype=torch.float64) for width in net.film_widths]
    found = net(images, [(gamma.expand(6, -1), beta.expand(6, -1)) for gamma, beta in film])
    plain = net(images)
    assert not torch.allclose(found, plain)
    nothing = [(torch.zeros(6, w), torch.zeros(6, w)) for w in net.film_widths]
    torch.testing.assert_close(net(images, nothing), plain, rtol=0, atol=1e-12)
    with torch.no_grad():
        for layer, (gamma, beta) in zip(layers, film, strict=True):
            layer.weight.mul_(1 + gamma[0])
            layer.bias.copy_((1 + gamma[0]) * layer.bias + beta[0])
    torch.testing.assert_close(found, net(images), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", BACKBONES)
def test_tasks_in_one_batch_are_each_task_alone(name):
    net = build(name).eval()
    images = torch.randn(3, 4, 2, 17, 20, dtype=torch.float64)
    gamma, beta = torch.randn(2, 3, sum(net.film_widths), dtype=torch.float64)
    together = net(images.flatten(0, 1), film_of(gamma, beta, net.film_widths, 4)).unflatten(0, (3, 4))
    for t in range(3):
        alone = net(images[t], film_of(gamma[t : t + 1], beta[t : t + 1], net.film_widths, 4))
        torch.testing.assert_close(together[t], alone, rtol=0, atol=1e-10)


def test_task_embedding_by_definition():
    torch.manual_seed(0)
    widths = (3, 3, 5, 3, 5)
    net = TaskEmbedding(7, widths).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    task = torch.randn(4, 7, dtype=torch.float64)
    found = dict(zip(("gamma", "beta"), (x.split(widths, dim=1) for x in net(task)), strict=True))
    used = set()
    for kind, parts in found.items():
        for layer, part in enumerate(parts):
            nets, place = net.nets[str(widths[layer])], net.place(layer, kind)
            used.add((widths[layer], place))
            h = F.silu(task @ nets.weights[0][place] + nets.biases[0][place])
            h = F.silu(h @ nets.weights[1][place] + nets.biases[1][place] + h)
            h = h @ nets.weights[2][place] + nets.biases[2][place] + h
            torch.testing.assert_close(part, nets.multiplier[place] * h, rtol=0, atol=1e-12)
    assert len(used) == 2 * len(widths)  # each from a network of its own
    assert len(net.weights()) == 6 and len(net.multipliers()) == 2


def test_task_embedding_begins_as_the_identity():
    torch.manual_seed(0)
    net = TaskEmbedding(512, (256, 512, 512))
    gamma, beta = net(torch.randn(2, 512))
    assert gamma.shape == beta.shape == (2, 1280) and not gamma.any() and not beta.any()
    (gamma.sum() + beta.sum()).backward()
    assert all(p.grad is not None for p in net.parameters())
    moved = {name for name, p in net.named_parameters() if p.grad.any()}
    assert moved == {"nets.256.multiplier", "nets.512.multiplier"}
    for width in (256, 512):
        for weight in net.nets[str(width)].weights:
            assert weight.var().item() == pytest.approx(0.1 * 2 / width, rel=0.02)
