"""Conv-4, the field's standard small backbone."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.nets.base import Backbone, Shape
from pipeline.nets.blocks import to_format
from pipeline.nets.by_name import choose
from pipeline.nets.film import Film, modulate
from pipeline.nets.norm import BatchNorm


class Conv4(Backbone):
    """Blocks of 3x3 convolution, batch-norm, ReLU and 2x2 max-pooling (Vinyals et al. 2016; Snell et al. 2017).

    28x28 images become 64 features, 84x84 become 1600 (at width 64). With ``strided`` the convolutions have stride 2
    instead of pooling, and the last map is averaged over space: the Omniglot network of MAML (Finn et al. 2017).
    Every layer can be modulated by the task.

    Args:
        width: filters of every block (64: prototypical and matching networks; 32: MAML and meta-LSTM on
            mini-ImageNet; 48: MAML++), or one number a block.
        strided: see above.
        same_padding: an odd map is padded before pooling, as TensorFlow's "SAME", so that 84x84 images end in 6x6
            instead of 5x5 (Reptile).
        average: take the mean of the last map over space; null: only if ``strided``. Reptile's Omniglot network is
            strided without it: 256 features.
        norm, affine, eps, momentum: see :class:`pipeline.nets.norm.BatchNorm`.
        bias: whether convolutions have a bias. Batch-norm cancels it, and Adam turns the rounding noise of its zero
            gradient into a random walk: false by default.
        init: "torch": PyTorch's default (uniform within 1/sqrt(fan_in)), which Snell's results were made with.
            "xavier": Glorot uniform, as MAML's TensorFlow code.
        negative_slope: of leaky ReLU (.01: MAML++); 0: ReLU.
        channels_last: memory format of the activations; 1.5 times as fast on CPU.
    """

    def __init__(
        self,
        shape: Shape,
        width: int | Sequence[int] = 64,
        strided: bool = False,
        same_padding: bool = False,
        average: bool | None = None,
        norm: str = "batch",
        affine: str = "full",
        eps: float = 1e-5,
        momentum: float = 0.1,
        bias: bool = False,
        init: str = "torch",
        negative_slope: float = 0.0,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        choose("init", init, ("torch", "xavier"))
        widths = [width] * 4 if isinstance(width, int) else list(width)
        channels, *size = shape
        self.strided, self.same_padding, self.channels_last = strided, same_padding, channels_last
        self.negative_slope = negative_slope
        self.average = strided if average is None else average
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for out in widths:
            conv = nn.Conv2d(channels, out, 3, stride=2 if strided else 1, padding=1, bias=bias)
            if init == "xavier":
                nn.init.xavier_uniform_(conv.weight)
            self.convs.append(conv)
            self.norms.append(BatchNorm(out, norm, affine, eps, momentum))
            size, channels = [(s + 1) // 2 if strided or same_padding else s // 2 for s in size], out
        if min(size) < 1:
            raise PipelineError(
                f"conv4 with {len(widths)} blocks halves images of {shape[1]}x{shape[2]} to nothing: "
                f"resize them to at least {2 ** len(widths)}x{2 ** len(widths)}"
            )
        self.film_widths = tuple(widths)
        self.map_shape = (channels, 1, 1) if self.average else (channels, size[0], size[1])
        self.out_features = math.prod(self.map_shape)

    def forward(self, images: Tensor, film: Film = ()) -> Tensor:
        x, pairs = to_format(images, self.channels_last), iter(film)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = modulate(norm(conv(x)), pairs)
            # ReLU and max commute; on the pooled map ReLU has a quarter of the work.
            x = x if self.strided else F.max_pool2d(x, 2, ceil_mode=self.same_padding)
            x = F.leaky_relu(x, self.negative_slope) if self.negative_slope else F.relu(x)
        return x.mean((2, 3)) if self.average else x.flatten(1)
