"""What ``torch.func`` and second derivatives ask of a network's code."""

from contextlib import AbstractContextManager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def differentiable_attention() -> AbstractContextManager[None]:
    """Within: attention is computed by what can be differentiated twice, as PyTorch's fused operation cannot."""
    return sdpa_kernel(SDPBackend.MATH)


def inside_transform() -> bool:
    """True within ``torch.func.vmap``, ``grad`` and the like, where some native operations are missing or wrong."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# What torch.compile traces runs under transforms of its own. This is torch.compiler.assume_constant_result, which would
# import the compiler with every model.
inside_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]
