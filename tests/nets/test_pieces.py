"""Networks over many images in pieces, against all at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.nets.norm import BatchNorm, recorded_statistics
from pipeline.nets.pieces import PIXELS, in_pieces

SIZE = 20
IMAGES = 3 * PIXELS // SIZE**2 + 5


class Counted(nn.Sequential):
    """A network that notes how many images it is given at once."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.seen: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(images))
        return super().forward(images)


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(IMAGES, 1, SIZE, SIZE)


@torch.no_grad()
def test_pieces_give_what_all_at_once_give(images):
    network = Counted(BatchNorm(4)).eval()
    whole = nn.Sequential.forward(network, images)
    torch.testing.assert_close(in_pieces(network, images), whole, rtol=1e-5, atol=1e-6)
    assert len(network.seen) == 4 and sum(network.seen) == IMAGES
    assert max(network.seen) * SIZE**2 <= PIXELS


@pytest.mark.parametrize("norm", [BatchNorm(4, "batch_statistics"), nn.BatchNorm2d(4, track_running_stats=False)])
@torch.no_grad()
def test_images_that_normalise_each_other_stay_together(images, norm):
    network = Counted(norm).eval()
    assert torch.equal(in_pieces(network, images), nn.Sequential.forward(network, images))
    assert network.seen == [IMAGES]


def test_training_gradients_and_recorded_statistics_see_all_images(images):
    network = Counted(BatchNorm(4)).eval()
    in_pieces(network, images)
    network[1].train()
    with torch.no_grad():
        in_pieces(network, images)
    network.eval()
    with torch.no_grad(), recorded_statistics(network):
        in_pieces(network, images)
    assert network.seen == [IMAGES] * 3
