"""Whether code runs under ``torch.func``."""

from __future__ import annotations

import torch
from torch import Tensor


def inside_transform() -> bool:
    """True within ``torch.func.vmap``, ``grad`` and the like, where some native operations are missing or wrong."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def has_own_values(buffer: Tensor) -> bool:
    """Whether the innermost transform maps over a module's buffer too, so that it may be changed in place there."""
    functorch = torch._C._functorch
    innermost = functorch.peek_interpreter_stack()
    mapped = innermost is not None and functorch.is_batchedtensor(buffer)
    return mapped and functorch.maybe_get_level(buffer) == innermost.level()


# What torch.compile traces runs under transforms of its own. This is torch.compiler.assume_constant_result, which would
# import the compiler with every model.
inside_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]
