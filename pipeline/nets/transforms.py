"""Whether code runs under ``torch.func``."""

from __future__ import annotations

import torch


def inside_transform() -> bool:
    """True within ``torch.func.vmap``, ``grad`` and the like, where some native operations are missing or wrong."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# What torch.compile traces runs under transforms of its own. This is torch.compiler.assume_constant_result, which would
# import the compiler with every model.
inside_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]
