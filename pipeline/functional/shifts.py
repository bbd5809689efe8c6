"""Conditionally shifted neurons (Munkhdalai, Yuan, Mehri & Trischler 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.functional.losses import PADDING
from pipeline.functional.precision import in_float32
from pipeline.functional.prototypes import one_hot


def shifted_relu(pre: Tensor, shift: Tensor, inside: bool = False) -> Tensor:
    """h = relu(a) + relu(beta) (equation 1); ``inside``: relu(a + beta), as a re-implementation."""
    return F.relu(pre + shift) if inside else F.relu(pre) + F.relu(shift)


@in_float32
def output_error(logits: Tensor, labels: Tensor) -> Tensor:
    """dL/da_T of the cross-entropy of every item alone: softmax(a_T) - y, [..., S, way]; 0 for padding."""
    error = logits.softmax(-1) - one_hot(labels, logits.shape[-1], logits.dtype)
    return error * (labels != PADDING).unsqueeze(-1)


def direct_feedback(pre: Tensor, active: Tensor, silent: Tensor) -> Tensor:
    """What a function g makes of the direct feedback sigma'(a) dL/da_T of every neuron, where sigma is the ReLU.

    sigma' is 1 or 0, so that g takes two values for all neurons of an image: ``active`` = g(dL/da_T), and
    ``silent`` = g(0).

    Args:
        pre: pre-activations [..., n].
        active, silent: broadcast to [..., n].
    """
    return torch.where(pre > 0, active, silent)
