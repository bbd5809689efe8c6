"""Support sets as sequences, and the causal operations of SNAIL (Mishra et al. 2018) over them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.functional.losses import PADDING
from pipeline.functional.precision import in_float32

AXES = {"keys": -1, "queries": -2}
_SEED = 0


def sequence_order(labels: Tensor, shuffle: bool, padding_first: bool = False) -> Tensor:
    """An order [T, S] of the support images with ``labels`` [T, S]: indices into them.

    With ``shuffle`` it is random. Otherwise it is one fixed permutation of the images in the order of their labels, so
    that it depends on nothing but the labels and the order within a class. Images with the label -1 come first or last,
    and do not change the order of the others.
    """
    absent = labels == PADDING
    if shuffle:
        keys = torch.rand(labels.shape, device=labels.device)
    else:
        by_label = labels.argsort(dim=1, stable=True)
        rank = by_label.argsort(dim=1) - absent.sum(1, keepdim=True)
        generator = torch.Generator().manual_seed(_SEED)
        fixed = torch.rand(labels.shape[1], generator=generator, dtype=torch.float64).to(labels.device)
        keys = fixed[rank.clamp(min=0)]
    return keys.where(~absent, -1.0 if padding_first else 2.0).argsort(dim=1, stable=True)


def reordered(x: Tensor, order: Tensor) -> Tensor:
    """The items of [T, S, ...] in an ``order`` [T, S]."""
    return x.gather(1, order.view(*order.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def gated_units(earlier: Tensor, now: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a causal convolution of kernel 2 sees of a position, gated: tanh(filter) * sigmoid(gate), [..., F].

    Args:
        earlier, now: [..., C], a position ``dilation`` steps back and the position itself.
        weight: [2 F, 2 C], rows of the filter and then of the gate, columns of ``earlier`` and then of ``now``.
        bias: [2 F].
    """
    units, gate = F.linear(torch.cat([earlier, now], dim=-1), weight, bias).chunk(2, dim=-1)
    return units.tanh() * gate.sigmoid()


@in_float32
def causal_attention(
    queries: Tensor, keys: Tensor, values: Tensor, present: Tensor | None = None, over: str = "keys"
) -> Tensor:
    """Scaled dot-product attention in which a position sees itself and those before it.

    Args:
        queries, keys: [T, N, K].
        values: [T, N, V].
        present: bool [T, N], positions that may be seen; all by default. Another position sees only itself.
        over: what the softmax sums to 1 over: "keys" (the paper's), or "queries", as a re-implementation by mistake,
            which makes what a position reads depend on the positions after it.

    Returns:
        [T, N, V].
    """
    length = keys.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=keys.device).tril()
    if present is not None:
        seen = seen & (present.unsqueeze(1) | torch.eye(length, dtype=torch.bool, device=keys.device))
    scores = queries @ keys.mT / math.sqrt(keys.shape[-1])
    return scores.masked_fill(~seen, -math.inf).softmax(AXES[over]) @ values


@in_float32
def last_attention(
    queries: Tensor, own_keys: Tensor, own_values: Tensor, keys: Tensor, values: Tensor, present: Tensor
) -> Tensor:
    """:func:`causal_attention` of Q positions, each of which is the last after the same S others.

    Args:
        queries, own_keys, own_values: [T, Q, K], [T, Q, K] and [T, Q, V] of the last positions.
        keys, values: [T, S, K] and [T, S, V] of the positions before them; ``present`` bool [T, S] may be seen.
    """
    before = (queries @ keys.mT).masked_fill(~present.unsqueeze(1), -math.inf)
    scores = torch.cat([before, (queries * own_keys).sum(-1, keepdim=True)], dim=-1) / math.sqrt(keys.shape[-1])
    weights = scores.softmax(-1)
    return weights[..., :-1] @ values + weights[..., -1:] * own_values
