"""Conditionally shifted neurons (Munkhdalai, Yuan, Mehri & Trischler 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.functional.losses import PADDING
from pipeline.functional.precision import in_float32
from pipeline.functional.prototypes import one_hot


def shifted_activation(pre: Tensor, shift: Tensor, inside: bool = False, slope: float = 0.0) -> Tensor:
    """h = sigma(a) + sigma(beta) (equation 1); ``inside``: sigma(a + beta), as a re-implementation.

    sigma is the ReLU, or with a ``slope`` below 0 the leaky one.
    """
    if inside:
        return F.leaky_relu(pre + shift, slope)
    return F.leaky_relu(pre, slope) + F.leaky_relu(shift, slope)


@in_float32
def output_error(logits: Tensor, labels: Tensor) -> Tensor:
    """dL/da_T of the cross-entropy of every item alone: softmax(a_T) - y, [..., S, way]; 0 for padding."""
    error = logits.softmax(-1) - one_hot(labels, logits.shape[-1], logits.dtype)
    return error * (labels != PADDING).unsqueeze(-1)


def direct_feedback(pre: Tensor, active: Tensor, silent: Tensor) -> Tensor:
    """What a function g makes of the direct feedback sigma'(a) dL/da_T of every neuron.

    sigma' is 1 above 0 and the slope of the ReLU below (0 unless it is leaky), so that g takes two values for all
    neurons of an image: ``active`` = g(dL/da_T) and ``silent`` = g(slope dL/da_T).

    Args:
        pre: pre-activations [..., n].
        active, silent: broadcast to [..., n].
    """
    return torch.where(pre > 0, active, silent)
