"""Augmentation: where dots of an image go is held against what the maps are said to be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.data.augment import Augmentation, augment, step_generator

HEIGHT, N = 105, 600
AT = np.array([[52, 52], [52, 82], [82, 52]])  # rows and columns of three blobs


def moved(strength: float, width: int = HEIGHT) -> np.ndarray:
    """Linear part and shift [N, 2, 3], in pixels (x, y), of the maps of N images, by the centres of their blobs."""
    images = torch.zeros((N, 3, HEIGHT, width), dtype=torch.uint8)
    for blob, (row, column) in enumerate(AT):
        images[:, blob, row - 2 : row + 3, column - 2 : column + 3] = 255
    out = augment(images, Augmentation(affine=strength), step_generator("cpu", "test")).double()
    mass = out.sum((2, 3))
    down, across = (torch.arange(n, dtype=torch.float64) for n in (HEIGHT, width))
    x, y = (out.sum(2) * across).sum(-1) / mass, (out.sum(3) * down).sum(-1) / mass
    centre = np.array([(width - 1) / 2, (HEIGHT - 1) / 2])
    seen = torch.stack([x, y], -1).numpy() - centre  # [N, 3 blobs, 2]
    given = np.concatenate([AT[:, ::-1] - centre, np.ones((3, 1))], 1)
    return np.stack([np.linalg.solve(given, points).T for points in seen])


@pytest.mark.parametrize("width", [105, 131])
def test_maps_are_within_the_published_bounds_and_each_part_is_there_half_the_time(width: int) -> None:
    maps = moved(1.0, width)
    backwards = np.linalg.inv(maps[:, :, :2])  # the maps are from output to input
    shift = -np.einsum("nij,nj->ni", backwards, maps[:, :, 2])
    shift *= 105 / np.array([width, HEIGHT])  # of the side
    assert np.abs(shift).max() < 2.1
    unshifted = (np.abs(shift) < 0.02).mean(0)
    assert np.all(np.abs(unshifted - 0.5) < 0.08)
    # turn @ [[1, a], [b, 1]] @ diag(c, d): the determinant is (1 - ab)cd, and no entry leaves its bounds
    determinant = np.linalg.det(backwards)
    assert determinant.min() > (1 - 0.09) * 0.64 - 0.02
    assert determinant.max() < (1 + 0.09) * 1.44 + 0.03
    length = np.linalg.norm(backwards, axis=1)  # of the columns: sqrt(1 + shear^2) * stretch
    assert length.min() > 0.79 and length.max() < 1.2 * math.hypot(1, 0.3) + 0.02
    untouched = (np.abs(maps - np.eye(2, 3)).max((1, 2)) < 0.02).mean()
    assert abs(untouched - 1 / 128) < 0.015


def test_strength_scales_the_maps_and_none_leaves_images_alone() -> None:
    whole, half = moved(1.0), moved(0.5)
    deviation = [np.abs(maps[:, :, :2] - np.eye(2)).mean() for maps in (whole, half)]
    assert abs(deviation[1] / deviation[0] - 0.5) < 0.05
    images = torch.randint(0, 256, (4, 3, 9, 12), dtype=torch.uint8)
    assert not Augmentation().active
    assert torch.equal(augment(images, Augmentation(), step_generator("cpu", 0)), images)


def test_an_image_of_one_colour_stays_so() -> None:
    images = torch.full((50, 3, 20, 30), 200, dtype=torch.uint8)
    assert torch.equal(augment(images, Augmentation(affine=2.0), step_generator("cpu", 0)), images)
