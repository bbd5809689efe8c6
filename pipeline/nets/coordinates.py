"""Small networks that are applied to every coordinate of something large, with the same weights for all."""

from __future__ import annotations

from torch import nn


def per_coordinate(inputs: int, units: int) -> nn.Sequential:
    """Three layers with ReLU between them: [..., inputs] to [..., 1]."""
    return nn.Sequential(nn.Linear(inputs, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, 1))
