"""Batch normalisation whose statistics can come from the batch, from running averages, or from elsewhere."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.nets import fused_norm
from pipeline.nets.by_name import choose
from pipeline.nets.fused_norm import wide
from pipeline.nets.transforms import inside_transform

MANY_VALUES = 10_000  # of a layer's input, from where `fused_norm` is differentiated twice faster (measured)

Statistics = dict[str, Tensor]  # "<layer>.mean" and "<layer>.var", each [C]


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) of [N, C, ...] over all dimensions but C.

    Args:
        channels: C.
        statistics: "batch": the batch's in training, running averages in evaluation. "batch_statistics": always the
            batch's, so that queries are normalised by each other (transductive; MAML, relation networks); nothing is
            averaged or stored.
        affine: "full" (gain and bias), "beta_only" (bias only, as MAML's TensorFlow code) or "none".
        eps: added to the variance.
        momentum: share of the new batch in the running averages.

    Under ``torch.func`` transforms the layer computes with elementary operations: ``vmap`` over PyTorch's native
    training-mode batch-norm returns wrong second-order gradients (torch 2.13, relative error 3e-3). Running averages
    are not updated there: a mapped function has no place to keep them.
    """

    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(
        self, channels: int, statistics: str = "batch", affine: str = "full", eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        choose("norm", statistics, ("batch", "batch_statistics"))
        choose("affine", affine, ("full", "beta_only", "none"))
        self.channels, self.eps, self.momentum, self.running = channels, eps, momentum, statistics == "batch"
        self.weight = nn.Parameter(torch.ones(channels)) if affine == "full" else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine != "none" else None
        self.register_buffer("running_mean", torch.zeros(channels) if self.running else None)
        self.register_buffer("running_var", torch.ones(channels) if self.running else None)
        self._fixed: tuple[Tensor, Tensor] | None = None
        self._recording = False
        self._recorded: tuple[Tensor, Tensor, int] | None = None

    def use_batch_statistics(self) -> None:
        """From now on always normalise by the batch; the running averages are dropped."""
        self.running, self.running_mean, self.running_var = False, None, None

    def forward(self, x: Tensor) -> Tensor:
        if self._fixed is not None:
            return self._normalise(x, *self._fixed)
        if self.running and not self.training and not self._recording:
            assert self.running_mean is not None and self.running_var is not None
            if x.dtype != self.running_mean.dtype and inside_transform():  # vmap's kernel takes one type only
                return self._normalise(x, self.running_mean, self.running_var)
            return self._native(x, training=False)
        if x.numel() == x.shape[1]:
            raise PipelineError(
                "batch statistics need more than one value a channel: classify several queries at once, "
                "or train with norms that do not depend on the batch (transductive=false)"
            )
        if self._recording or inside_transform():
            return self._normalise(x, *self._batch_moments(x))
        return self._native(x, training=True)

    def _average(self, mean: Tensor, var: Tensor, values: int) -> None:
        """Move the running averages, where there are any, as PyTorch does, which takes the unbiased variance."""
        for running, new in ((self.running_mean, mean), (self.running_var, var * (values / (values - 1)))):
            if running is not None:
                # As data: PyTorch's kernel, which another call of the step may take, saves it for a gradient of none
                running.data.mul_(1 - self.momentum).add_(self.momentum * new)

    def _native(self, x: Tensor, training: bool) -> Tensor:
        weight: Tensor | None = self.weight
        if weight is None and self.bias is not None:  # PyTorch cannot differentiate twice with a bias alone
            weight = torch.ones_like(self.bias)
        if training and self._better_fused(x):
            gain = x.new_ones(self.channels) if weight is None else weight
            bias = x.new_zeros(self.channels) if self.bias is None else self.bias
            out, mean, var = fused_norm.batch_norm(x, gain, bias, self.eps)
            self._average(mean, var, x.numel() // x.shape[1])
            return out
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, weight, self.bias, training, self.momentum, self.eps
        )

    def _better_fused(self, x: Tensor) -> bool:
        """Whether PyTorch would lose digits, or this may be differentiated twice and is so large that it pays."""
        own = self.weight if self.weight is not None else self.bias
        half = x.dtype not in (torch.float32, torch.float64) or (own is not None and own.dtype != x.dtype)
        if half or x.is_cuda or torch.compiler.is_compiling():
            return False
        twice = not self.running and torch.is_grad_enabled() and x.numel() >= MANY_VALUES
        return twice or fused_norm.inexact(x)

    def _batch_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [C] of x [N, C, ...]."""
        dims = [0, *range(2, x.ndim)]
        mean = x.mean(dims)
        var = (x - wide(mean, x)).square().mean(dims)
        if self._recording:
            self._recorded = (mean, var, x.numel() // x.shape[1])
        return mean, var

    def _normalise(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """(x - mean) / sqrt(var + eps) * weight + bias; gradients also flow through mean and var."""
        gain = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            gain = gain * self.weight
        shift = -mean * gain if self.bias is None else self.bias - mean * gain
        return x * wide(gain, x) + wide(shift, x)

    def extra_repr(self) -> str:
        return f"{self.channels}, running={self.running}, eps={self.eps}"


def batch_norms(module: nn.Module) -> dict[str, BatchNorm]:
    """Every batch-norm layer in ``module`` by its name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, BatchNorm)}


def in_rows(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, to be those of ``module``: where a layer of it has rows of gains and biases [R, C], one for each
    of R uses (MAML++'s inner steps), the one row [C] of a network without is repeated."""
    layers = batch_norms(module)
    rows = {f"{n}.{p}": v for n in layers for p, v in layers[n].named_parameters() if v.ndim > 1}
    fits = {name: tensor.shape == rows[name].shape[1:] for name, tensor in tensors.items() if name in rows}
    return {name: tensor.expand_as(rows[name]) if fits.get(name) else tensor for name, tensor in tensors.items()}


def looks_at_the_batch(module: nn.Module) -> bool:
    """Whether in evaluation an image's answer depends on the images beside it."""
    own = any(not layer.running or layer._recording for layer in batch_norms(module).values())
    return own or any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None for m in module.modules()
    )


@contextmanager
def recorded_statistics(module: nn.Module, values: dict[str, int] | None = None) -> Iterator[Statistics]:
    """Within: every layer normalises by the batch it is given; afterwards the dictionary holds what it used, and
    ``values`` of how many values of a channel that is the mean and biased variance.

    The statistics keep their graph. Read them outside the ``with`` but, under ``vmap``, inside the mapped function.
    """
    layers, statistics = batch_norms(module), Statistics()
    for layer in layers.values():
        layer._recording = True
    try:
        yield statistics
        for name, layer in layers.items():
            if layer._recorded is not None:
                statistics[f"{name}.mean"], statistics[f"{name}.var"], count = layer._recorded
                if values is not None:
                    values[name] = count
    finally:
        for layer in layers.values():
            layer._recording, layer._recorded = False, None


@contextmanager
def fixed_statistics(module: nn.Module, statistics: Statistics) -> Iterator[None]:
    """Within: every layer normalises by the given statistics, whatever the batch."""
    layers = batch_norms(module)
    try:
        for name, layer in layers.items():
            layer._fixed = statistics[f"{name}.mean"], statistics[f"{name}.var"]
        yield
    finally:
        for layer in layers.values():
            layer._fixed = None


class _NormAct(BatchNorm):
    """Batch normalisation with dropout and an activation behind it, as timm's layers of one piece have them."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def replace_native(module: nn.Module) -> None:
    """Replace every ``torch.nn.BatchNorm`` inside ``module`` by :class:`BatchNorm` with the same weights, in place.

    A layer that is used in several places stays one layer.

    Raises:
        PipelineError: a batch-norm of a class that does more than PyTorch's.
    """
    replaced: dict[nn.Module, BatchNorm] = {}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():  # named_children leaves out a layer's second name
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                if child not in replaced:
                    replaced[child] = _from_native(child)
                setattr(parent, name, replaced[child])


def always_by_the_batch(module: nn.Module) -> None:
    """Every batch-norm inside ``module``, PyTorch's too, normalises by its batch from now on; averages are dropped.

    Raises:
        PipelineError: the network was asked to go by its averages.
    """
    if any(getattr(part, "by_averages", False) for part in module.modules()):
        raise PipelineError(
            "backbone.batch_norm=averages: this method normalises by the images at hand and has no averages; give "
            "batch, or choose a method that keeps them"
        )
    replace_native(module)
    for layer in batch_norms(module).values():
        layer.use_batch_statistics()


def _from_native(native: nn.modules.batchnorm._BatchNorm) -> BatchNorm:
    with_act = isinstance(getattr(native, "act", None), nn.Module) and isinstance(
        getattr(native, "drop", None), nn.Module
    )
    if not with_act and not type(native).__module__.startswith("torch.nn."):
        raise PipelineError(
            f"batch-norm of the class {type(native).__name__} cannot have other weights for every task: choose a "
            "network with torch.nn.BatchNorm2d, or a method that does not adapt it"
        )
    kind = _NormAct if with_act else BatchNorm
    statistics = "batch" if native.running_mean is not None else "batch_statistics"
    momentum = 0.1 if native.momentum is None else native.momentum
    layer = kind(native.num_features, statistics, "full" if native.affine else "none", native.eps, momentum)
    if isinstance(layer, _NormAct):
        layer.drop, layer.act = native.drop, native.act  # type: ignore[assignment]
    for like in native.parameters():
        layer.to(like)
    layer.load_state_dict({k: v for k, v in native.state_dict().items() if k != "num_batches_tracked"})
    for mine, theirs in zip(layer.parameters(), native.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return layer.train(native.training)
