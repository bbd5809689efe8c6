"""A second network of the same architecture."""

import copy

import torch
from torch import nn


@torch.no_grad()
def fresh_copy(module: nn.Module) -> nn.Module:
    """A copy of a newly initialised ``module`` with a start of its own.

    The values of every weight matrix and kernel are shuffled: entries drawn independently from one distribution are
    again such a draw, whatever the distribution was.
    """
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        if parameter.ndim > 1:
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
    return other
