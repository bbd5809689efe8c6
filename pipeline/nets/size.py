"""How much a network computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.nets.norm import batch_norms


def hidden_values(network: nn.Module, images: Tensor) -> int:
    """How many values the convolutions of ``network`` put out for one of ``images`` [..., C, H, W].

    The network sees a black image, without its batch-norm, whose weights may be those of other inner steps; no random
    number is taken from the run's.
    """
    found = []

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found.append(output[0].numel())

    convolutions = [m for m in network.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    hooks = [module.register_forward_hook(count) for module in convolutions]
    norms = batch_norms(network).values()
    for norm in norms:
        norm.forward = nn.Identity().forward  # type: ignore[method-assign,assignment]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            network(images.new_zeros(1, *images.shape[-3:]))
    finally:
        for hook in hooks:
            hook.remove()
        for norm in norms:
            del norm.forward
    return sum(found)
