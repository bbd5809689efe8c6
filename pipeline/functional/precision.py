"""Heads compute in float32 even where the backbone runs in half precision."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
HALF = (torch.float16, torch.bfloat16)


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` without autocast and with half-precision tensors raised to float32.

    Distances are differences of large sums: in bfloat16 (8 bits) near classes become the same.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
        raised = [a.float() if isinstance(a, Tensor) and a.dtype in HALF else a for a in args]
        with torch.autocast(device, enabled=False):
            return function(*raised, **kwargs)  # type: ignore[arg-type]

    return wrapped
