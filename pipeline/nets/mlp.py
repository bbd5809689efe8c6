"""A multi-layer perceptron over flattened images."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nets.base import Backbone, Shape


class MLP(Backbone):
    """relu(x W^T + b), once for every width. The fully connected Omniglot network of MAML without batch-norm.

    Args:
        widths: outputs of every layer.
    """

    def __init__(self, shape: Shape, widths: Sequence[int] = (64,)) -> None:
        super().__init__()
        inputs = shape[0] * shape[1] * shape[2]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise([inputs, *widths]))
        self.out_features = widths[-1] if widths else inputs

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        for layer in self.layers:
            x = F.relu(layer(x))
        return x
