"""The convolutional network of Siamese one-shot recognition (Koch, Zemel & Salakhutdinov 2015, figure 4)."""

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.nets.base import Backbone, Shape
from pipeline.nets.blocks import to_format
from pipeline.nets.by_name import choose

LAYERS = ((64, 10), (128, 7), (128, 4), (256, 4))  # filters and side of every convolution


class Koch(Backbone):
    """Four convolutions without padding, each with ReLU, 2x2 max-pooling after the first three, then a sigmoid layer.

    105 x 105 drawings become 96, 48, 42, 21, 18, 9 and 6 wide, and 9,216 values become 4,096 features in (0, 1).

    Args:
        shape: (C, H, W) of the images, at least 65 x 65.
        features: width of the sigmoid layer.
        init: "koch": convolutions N(0, 0.01^2), the last layer's weights N(0, 0.2^2), biases N(0.5, 0.01^2), as in the
            paper. "torch": PyTorch's default.
        channels_last: memory format of the activations, faster on CPU.
    """

    def __init__(self, shape: Shape, features: int = 4096, init: str = "koch", channels_last: bool = True) -> None:
        super().__init__()
        choose("init", init, ("koch", "torch"))
        channels, *size = shape
        self.channels_last = channels_last
        self.convs = nn.ModuleList()
        for number, (filters, side) in enumerate(LAYERS):
            self.convs.append(nn.Conv2d(channels, filters, side))
            channels, size = filters, [s - side + 1 for s in size]
            if number < len(LAYERS) - 1:
                size = [s // 2 for s in size]
        if min(size) < 1:
            raise PipelineError(
                f"koch cuts images of {shape[1]}x{shape[2]} to nothing: give it the drawings of 105x105, at least 65x65"
            )
        self.top = nn.Linear(channels * size[0] * size[1], features)
        self.out_features = features
        if init == "koch":
            for layer in (*self.convs, self.top):
                nn.init.normal_(layer.weight, 0.0, 0.2 if layer is self.top else 0.01)
                nn.init.normal_(layer.bias, 0.5, 0.01)

    def forward(self, images: Tensor) -> Tensor:
        x = to_format(images, self.channels_last)
        for number, conv in enumerate(self.convs):
            x = conv(x)
            x = F.relu(F.max_pool2d(x, 2) if number < len(LAYERS) - 1 else x)  # ReLU and max commute
        return self.top(x.flatten(1)).sigmoid()
