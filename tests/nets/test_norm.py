from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from pipeline.errors import PipelineError
from pipeline.nets import fused_norm, norm
from pipeline.nets.norm import BatchNorm, batch_norms, fixed_statistics, recorded_statistics, replace_native


def randomised(layer: BatchNorm) -> BatchNorm:
    layer = layer.double()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return layer


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5)])
def test_agrees_with_pytorch_in_training_and_evaluation(shape):
    torch.manual_seed(0)
    native = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(3, eps=1e-3, momentum=0.2).double()
    nn.init.uniform_(native.weight)
    holder = nn.Sequential(nn.Sequential(native))
    replace_native(holder)
    own = holder[0][0]
    assert isinstance(own, BatchNorm)
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(own(x), native(x), rtol=0, atol=0)
    native.eval()
    own.eval()
    torch.testing.assert_close(own(x), native(x), rtol=0, atol=0)
    assert torch.equal(own.running_var, native.running_var)


@pytest.mark.parametrize("affine", ["full", "beta_only", "none"])
def test_batch_statistics_by_definition_and_under_vmap(affine):
    torch.manual_seed(0)
    layer = randomised(BatchNorm(3, "batch_statistics", affine, eps=1e-3)).eval()
    x = torch.randn(4, 5, 3, 2, 2, dtype=torch.float64) * 3 + 1
    mean, var = x.mean((1, 3, 4), keepdim=True), x.var((1, 3, 4), keepdim=True, correction=0)
    expected = (x - mean) / (var + 1e-3).sqrt()
    if layer.weight is not None:
        expected = expected * layer.weight.view(3, 1, 1)
    if layer.bias is not None:
        expected = expected + layer.bias.view(3, 1, 1)
    torch.testing.assert_close(torch.stack([layer(task) for task in x]), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected, rtol=0, atol=1e-12)
    names = {"full": ["weight", "bias"], "beta_only": ["bias"], "none": []}
    assert [n for n, _ in layer.named_parameters()] == names[affine]
    assert not list(layer.buffers())


def test_second_order_under_vmap_is_the_finite_difference():
    """PyTorch's native layer fails this by 3e-3."""
    torch.manual_seed(0)
    layer = randomised(BatchNorm(2, "batch_statistics"))
    x, target = torch.randn(2, 6, 2, 3, 3, dtype=torch.float64), torch.randn(2, 6, 2, 3, 3, dtype=torch.float64)

    def squared_gradient(gain: torch.Tensor) -> torch.Tensor:
        def loss(x, target):
            return (layer(gain.view(-1, 1, 1) * x.tanh()) * target).square().mean()

        return torch.func.vmap(torch.func.grad(loss))(x, target).square().sum()

    gain = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(squared_gradient(gain), gain)
    for i in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[i] = 1e-5
        difference = (squared_gradient(gain + step) - squared_gradient(gain - step)) / 2e-5
        assert gradient[i].item() == pytest.approx(difference.item(), rel=1e-6)


def test_recorded_statistics_fix_the_answer_for_other_batches():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), randomised(BatchNorm(3, "batch_statistics")), nn.ReLU()).double()
    support, query = torch.randn(5, 1, 6, 6, dtype=torch.float64), torch.randn(4, 1, 6, 6, dtype=torch.float64)
    with recorded_statistics(net) as statistics:
        alone = net(support)
    assert set(statistics) == {"1.mean", "1.var"}
    with fixed_statistics(net, statistics):
        torch.testing.assert_close(net(support), alone, rtol=0, atol=1e-12)
        one, many = net(query[:1]), net(query)
    torch.testing.assert_close(one, many[:1], rtol=0, atol=1e-12)
    assert not torch.allclose(net(query), many)
    assert statistics["1.mean"].requires_grad


def test_recording_leaves_the_running_averages_alone():
    layer = BatchNorm(2).eval()
    x = torch.randn(8, 2)
    before = layer(x)
    with recorded_statistics(nn.Sequential(layer)):
        layer(x)
    assert torch.equal(layer(x), before)


def test_one_value_a_channel_is_refused():
    with pytest.raises(PipelineError, match="more than one value"):
        BatchNorm(3, "batch_statistics")(torch.randn(1, 3, 1, 1))


def test_dropping_running_averages():
    layer = BatchNorm(2)
    layer.use_batch_statistics()
    assert not list(layer.buffers()) and list(batch_norms(nn.Sequential(layer))) == ["0"]
    assert layer.eval()(torch.randn(50, 2)).mean().item() == pytest.approx(0, abs=1e-6)


def test_running_averages_advance_where_the_network_is_compiled():
    torch.manual_seed(0)
    plain, compiled = BatchNorm(3).train(), BatchNorm(3).train()
    x = torch.randn(8, 3, 4, 4)
    torch.testing.assert_close(torch.compile(compiled, backend="eager")(x), plain(x))
    torch.testing.assert_close(compiled.running_mean, plain.running_mean)
    assert compiled.running_mean.abs().sum() > 0


def background(images: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Channels-last maps [images, 6, size, size] that are constant but for a tenth: means large beside deviations."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(images, 1, size, size, generator=generator) < 0.1
    paper = 1 + 0.3 * torch.rand(1, 6, 1, 1, generator=generator)
    x = paper + 0.05 * torch.randn(images, 6, size, size, generator=generator) * drawn
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("affine", ["full", "beta_only", "none"])
@pytest.mark.parametrize("statistics", ["batch", "batch_statistics"])
@pytest.mark.parametrize(("images", "size"), [(60, 28), (3, 84), (13, 10)])
def test_statistics_are_exact_in_channels_last(images, size, statistics, affine):
    """PyTorch's kernel is off by 2 % of the deviation at 60 images of 28x28, by .7 % at 3 of 84x84."""
    x = background(images, size)
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def passes(x):
        layer = BatchNorm(6, statistics, affine).to(x.dtype).train()
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = layer(leaf)
        (out * probe).sum().backward()
        return out.detach(), [leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]

    assert fused_norm.inexact(x) == (images * size**2 > fused_norm.PIECE)
    (found, others), (expected, exact) = passes(x), passes(x.double().contiguous())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)  # in deviations
    for mine, theirs in zip(others, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))


def test_large_and_small_batches_go_through_one_layer_in_one_step():
    """The first takes PyTorch's kernel, the second does not, and one backward pass goes through both."""
    layer, small, large = BatchNorm(6), background(1, 10), background(60, 10)
    assert not fused_norm.inexact(small) and fused_norm.inexact(large)
    (layer(small).square().sum() + layer(large).square().sum()).backward()
    assert layer.weight.grad is not None


def test_exact_statistics_differentiate_twice():
    """Against PyTorch's own second derivatives in float64."""
    x = background(30, 10, torch.float64)
    assert fused_norm.inexact(x)

    def second(images, ours):
        layer = BatchNorm(6, "batch_statistics").double().train()
        leaf = images.clone(memory_format=torch.preserve_format).requires_grad_()
        plain = partial(torch.nn.functional.batch_norm, weight=layer.weight, bias=layer.bias, training=True)
        out = layer(leaf) if ours else plain(leaf, None, None)
        leaves = [leaf, layer.weight, layer.bias]
        first = torch.autograd.grad((out**3).sum(), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum((g**2).sum() for g in first), leaves)]

    for mine, theirs in zip(second(x, True), second(x.contiguous(), False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8 * float(theirs.detach().abs().max()))


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (7, 4), (6, 2, 5)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_twice_differentiable_form_is_native_bit_for_bit_and_its_second_derivative_agrees(shape, channels_last):
    """Against PyTorch's own derivatives in float64, through losses that use every first derivative."""
    if channels_last and len(shape) < 4:
        pytest.skip("no such format")
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape[1], shape[1])]
    if channels_last:
        values[0] = values[0].contiguous(memory_format=torch.channels_last)
    values[1][0] = 0.0  # a gain of zero divides nothing

    def derivatives(normalise):
        x, weight, bias = leaves = [value.clone().requires_grad_() for value in values]
        out = normalise(x, weight, bias)
        first = torch.autograd.grad((out**3).sum(), leaves, create_graph=True)
        return [out, *first], torch.autograd.grad(sum((g**2).sum() for g in first), leaves)

    once, second = derivatives(lambda x, w, b: fused_norm.batch_norm(x, w, b, 1e-5)[0])
    native, native_second = derivatives(lambda x, w, b: torch.nn.functional.batch_norm(x, None, None, w, b, True, 0.1))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(once, native, strict=True))
    for mine, theirs in zip(second, native_second, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_large_maps_take_the_twice_differentiable_form_and_nothing_changes(monkeypatch):
    x = torch.randn(5, 8, 20, 20, generator=torch.Generator().manual_seed(0))
    assert x.numel() >= norm.MANY_VALUES
    called, original = [], fused_norm.batch_norm
    monkeypatch.setattr(norm.fused_norm, "batch_norm", lambda *a: called.append(1) or original(*a))
    layer = BatchNorm(8, "batch_statistics")
    leaf = x.clone().requires_grad_()
    layer(leaf).square().sum().backward()
    assert called
    native = torch.nn.functional.batch_norm(x.requires_grad_(), None, None, torch.ones(8), torch.zeros(8), True)
    native.square().sum().backward()
    assert torch.equal(leaf.grad, x.grad)


def test_a_layer_that_is_used_twice_stays_one():
    """PyTorch lists the children of a module once each, whatever their names."""
    net = nn.Module()
    net.first = nn.BatchNorm2d(3)
    net.second = net.first
    net.inner = nn.Sequential(nn.Conv2d(3, 3, 1), net.first)
    replace_native(net)
    assert isinstance(net.first, BatchNorm) and net.second is net.first and net.inner[1] is net.first


def test_an_activation_in_one_piece_with_its_norm_stays():
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    native = BatchNormAct2d(3).train()
    holder = nn.Sequential(copy.deepcopy(native))
    replace_native(holder)
    images = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(holder(images), native(images))
    assert float(holder(images).detach().min()) == 0

    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(PipelineError, match="batch-norm of the class Own cannot have other weights for every task"):
        replace_native(nn.Sequential(Own(3)))
