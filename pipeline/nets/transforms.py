"""Whether code runs under ``torch.func``."""

from __future__ import annotations

import torch


@torch.compiler.assume_constant_result  # what a compiler traces runs under transforms of its own
def inside_transform() -> bool:
    """True within ``torch.func.vmap``, ``grad`` and the like, where some native operations are missing or wrong."""
    return torch._C._functorch.peek_interpreter_stack() is not None
