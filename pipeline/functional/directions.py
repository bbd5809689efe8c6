"""Vectors of unit length."""

from __future__ import annotations

from torch import Tensor

from pipeline.functional.precision import in_float32


@in_float32
def unit(x: Tensor, eps: float = 1e-5) -> Tensor:
    """x / max(||x||, eps) over the last dimension: [..., D] to [..., D].

    Exact for vectors longer than ``eps``; a vector of zeros stays zero and has a finite gradient.
    """
    return x * x.square().sum(-1, keepdim=True).clamp(min=eps * eps).rsqrt()
