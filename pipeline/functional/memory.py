"""A memory of keys and values that queries read by soft attention (Munkhdalai & Yu 2017; Munkhdalai et al. 2018)."""

from __future__ import annotations

from torch import Tensor

from pipeline.functional.attention import attention
from pipeline.functional.distances import DISTANCES
from pipeline.functional.precision import in_float32

SIMILARITIES = ("cosine", "dot")


@in_float32
def recall(queries: Tensor, keys: Tensor, present: Tensor, similarity: str = "cosine") -> Tensor:
    """How much each query takes from each memory: softmax over the memories of the similarity of keys, [T, Q, S].

    Args:
        queries, keys: [T, Q, D] and [T, S, D].
        present: bool [T, S], memories that hold something.
        similarity: one of ``SIMILARITIES``.
    """
    return attention(-DISTANCES[similarity](queries, keys), present)  # 1 - cosine: the softmax does not see the 1


@in_float32
def mixture(weights: Tensor, values: Tensor) -> Tensor:
    """The values [T, S, V] mixed by weights [T, Q, S]: [T, Q, V]."""
    return weights @ values
