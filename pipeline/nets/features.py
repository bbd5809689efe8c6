"""Nothing more: the features of a frozen network, of a dataset that holds them in place of images."""

from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.nets.base import Backbone, Shape


class Features(Backbone):
    """Takes features for what they are, so that a head can be trained and measured on them.

    Args:
        shape: (D, 1, 1) of a dataset that ``jobs.embed`` made.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        if shape[1:] != (1, 1):
            raise PipelineError(
                f"backbone=features takes features, and not images of {shape[0]}x{shape[1]}x{shape[2]}: make a dataset "
                "of them with python -m jobs.embed, or choose another backbone"
            )
        self.out_features = shape[0]

    def forward(self, features: Tensor) -> Tensor:
        """[N, D, 1, 1] -> [N, D]."""
        return features.flatten(1)
