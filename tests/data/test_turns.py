"""Quarter turns of many images at once, against numpy's of one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.data.augment import quarter_turns


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])  # two ways on a CPU: bytes have their own
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("which", [[0, 1, 2, 3], [0], [2], [1, 3]])
def test_every_image_is_turned_by_its_own(dtype: torch.dtype, channels: int, which: list[int]) -> None:
    draw = np.random.default_rng(0)
    images = torch.from_numpy(draw.integers(0, 256, (37, channels, 5, 5), dtype=np.uint8)).to(dtype)
    turns = torch.from_numpy(draw.choice(which, 37))
    before = images.clone()
    turned = quarter_turns(images, turns)
    assert turned.dtype == dtype and turned.is_contiguous() and torch.equal(images, before)
    for image, turn, found in zip(images, turns, turned, strict=True):
        assert np.array_equal(found, np.rot90(image, int(turn), (1, 2)))


def test_images_that_are_not_square_cannot_be_turned() -> None:
    images = torch.zeros(2, 1, 3, 4, dtype=torch.uint8)
    assert quarter_turns(images, torch.zeros(2, dtype=torch.int64)) is images
    with pytest.raises(ValueError, match="not square"):
        quarter_turns(images, torch.ones(2, dtype=torch.int64))
