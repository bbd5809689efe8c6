"""The convolutional network of R2-D2, and the form that MetaOptNet gave it."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.nets.base import Backbone, Shape
from pipeline.nets.blocks import leaky_relu, sizes_after, to_format
from pipeline.nets.by_name import choose
from pipeline.nets.film import Film, modulate
from pipeline.nets.norm import BatchNorm

DROPOUT = {"r2d2": (0.1, 0.1), "metaopt": (0.1, 0.3)}


class R2D2Net(Backbone):
    """Four blocks of 3x3 convolution, batch-norm, 2x2 max-pooling and leaky ReLU; features of the last two blocks.

    Args:
        variant: "r2d2": the last pooling has stride 1, and the third block is pooled once more, with stride 1, for the
            features: 31,104 + 41,472 = 72,576 of 84x84 images (Bertinetto et al. 2019, official code). "metaopt": the
            last pooling has stride 2, the last block no activation, and the third is taken as it is: 51,200 features
            (MetaOptNet's code; the R2-D2 of Goldblum et al. 2020).
        widths: filters of the four blocks; 64 each for the "64C" network.
        dropout: after the third and the fourth block, one number or two; null: .1 (.4 in the paper for CIFAR-FS, 0 for
            Omniglot) and, for "metaopt", .1 and .3.
        eps, momentum: of batch-norm.
        bias: whether convolutions have a bias, as the official code; batch-norm cancels it.
        channels_last: memory format of the activations.
    """

    def __init__(
        self,
        shape: Shape,
        variant: str = "r2d2",
        widths: Sequence[int] = (96, 192, 384, 512),
        dropout: float | Sequence[float] | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        bias: bool = False,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.original = choose("variant", variant, DROPOUT) == "r2d2"
        rates = DROPOUT[variant] if dropout is None else dropout
        self.dropout = (rates, rates) if isinstance(rates, int | float) else tuple(rates)
        if len(self.dropout) != 2 or not all(0 <= rate < 1 for rate in self.dropout):
            raise PipelineError(f"dropout={dropout}: give a share in [0, 1), or two of them")
        if len(widths) != 4:
            raise PipelineError(f"widths={list(widths)}: r2d2_net has four blocks")
        if min(shape[1:]) < 16:
            raise PipelineError(
                f"r2d2_net pools images of {shape[1]}x{shape[2]} to nothing: resize them to at least 16x16"
            )
        self.channels_last = channels_last
        channels = pairwise([shape[0], *widths])
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=bias) for i, o in channels)
        self.norms = nn.ModuleList(BatchNorm(width, eps=eps, momentum=momentum) for width in widths)
        self.film_widths = tuple(widths)
        third = sizes_after(shape[1:], 3)
        last = [s - 1 if self.original else s // 2 for s in third]
        third = last if self.original else third
        self.out_features = widths[2] * third[0] * third[1] + widths[3] * last[0] * last[1]

    def forward(self, images: Tensor, film: Film = ()) -> Tensor:
        x, pairs = to_format(images, self.channels_last), iter(film)
        maps = []
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            last = number == 3
            x = F.max_pool2d(modulate(norm(conv(x)), pairs), 2, stride=1 if last and self.original else 2)
            x = x if last and not self.original else leaky_relu(x)
            if number >= 2:
                x = F.dropout(x, self.dropout[number - 2], self.training)
                maps.append(x if last or not self.original else F.max_pool2d(x, 2, stride=1))
        return torch.cat([m.flatten(1) for m in maps], dim=1)
