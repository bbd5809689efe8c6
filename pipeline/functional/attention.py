"""Attention over support images (Vinyals et al. 2016), the LSTM step of full-context embeddings, and memories of keys
and values that queries read by attention (Munkhdalai & Yu 2017; Munkhdalai et al. 2018)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.functional.distances import DISTANCES, cosine
from pipeline.functional.precision import in_float32

CLAMP = 1e-8  # probabilities stay this far from 0 and 1 before the logarithm
SIMILARITIES = ("cosine", "dot")  # of the keys of a memory


@in_float32
def attention(scores: Tensor, present: Tensor) -> Tensor:
    """softmax of scores [T, Q, S] over the support images; those not ``present`` [T, S] get nothing."""
    return scores.masked_fill(~present.unsqueeze(-2), -torch.inf).softmax(-1)


@in_float32
def log_attended(distances: Tensor, members: Tensor) -> Tensor:
    """log p(y = c | x) = log sum_{i in c} softmax_i(-d(x, x_i)), p within [1e-8, 1 - 1e-8] (equation 1).

    Attention is over images: a class with more of them gets more.

    Args:
        distances: [T, Q, S]; with the cosine distance 1 - cos the attention is the paper's softmax of cosines.
        members: [T, S, way], the indicator of every support image's class (a row of zeros for padding).
    """
    probabilities = attention(-distances, members.any(-1)) @ members.to(distances.dtype)
    return probabilities.clamp(CLAMP, 1 - CLAMP).log()


@in_float32
def cosine_sums(query: Tensor, support: Tensor, members: Tensor) -> Tensor:
    """Logits [T, Q, way]: the cosines of a class's images summed, without an attention (Ravi & Larochelle's code)."""
    return (1 - cosine(query, support, eps=1e-12)) @ members.to(query.dtype)


@in_float32
def log_sharpened(query: Tensor, support: Tensor, members: Tensor) -> Tensor:
    """log(p + 1e-6) [T, Q, way] for the attention softmax(100 relu(cos)) (the code of Chen et al. 2019).

    Args:
        query, support: [T, Q, D] and [T, S, D]; 1e-5 is added to each norm.
    """
    scores = 100 * F.relu(1 - cosine(query, support, eps=1e-5))
    return (attention(scores, members.any(-1)) @ members.to(query.dtype) + 1e-6).log()


def lstm_step(
    inputs: Tensor, hidden: Tensor, cell: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM without peepholes: the next hidden state and cell, both [..., D].

    Args:
        inputs, hidden: [..., I] and [..., H]; H need not be D.
        cell: [..., D].
        w_ih, w_hh, b_ih, b_hh: [4D, I], [4D, H], [4D] and [4D], gates in the order input, forget, candidate, output.
    """
    gates = F.linear(inputs, w_ih, b_ih) + F.linear(hidden, w_hh, b_hh)
    enter, keep, candidate, leave = gates.chunk(4, dim=-1)
    cell = keep.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
    return leave.sigmoid() * cell.tanh(), cell


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
