"""All parameters of a network as one vector, which inner loops update as a whole."""

from collections.abc import Mapping

import torch
from torch import Tensor

Shapes = Mapping[str, torch.Size]


def flatten(parameters: Mapping[str, Tensor]) -> Tensor:
    """Parameters by name to a vector [P], in the order of the names."""
    return torch.cat([value.reshape(-1) for value in parameters.values()])


def unflatten(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """[..., P] to parameters [..., *shape] by name. One split: its derivative is one concatenation."""
    parts = flat.split([shape.numel() for shape in shapes.values()], dim=-1)
    return {name: part.unflatten(-1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
