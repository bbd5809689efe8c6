"""A network as a user has it: a plain module in a file, which knows nothing of this package."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LazyConv2d(width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images).mean((2, 3))
