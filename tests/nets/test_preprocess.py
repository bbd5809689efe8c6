from __future__ import annotations

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.nets import Preprocess

IMAGES = torch.arange(256, dtype=torch.uint8).view(2, 1, 2, 8, 8).expand(2, 3, 2, 8, 8)


def test_unit_and_none():
    torch.testing.assert_close(Preprocess("unit")(IMAGES), IMAGES / 255, rtol=0, atol=0)
    assert Preprocess("none")(IMAGES).max() == 255 and Preprocess("none")(IMAGES).dtype == torch.float32


def test_standard():
    mean, std = [0.2, 0.7], [0.1, 0.3]
    found = Preprocess("standard", mean, std).double()(IMAGES)
    for c in range(2):
        expected = (IMAGES[:, :, c].double() / 255 - mean[c]) / std[c]
        torch.testing.assert_close(found[:, :, c], expected, rtol=0, atol=1e-6)


def test_nothing_of_it_is_in_the_weights():
    assert not Preprocess("standard", [0.5], [0.5]).state_dict()


@pytest.mark.parametrize(
    "options", [{"scaling": "byte"}, {"scaling": "standard"}, {"scaling": "standard", "mean": [0.1], "std": [0.0]}]
)
def test_bad_options(options):
    with pytest.raises(PipelineError):
        Preprocess(**options)


def test_preprocessed_images_are_refused():
    with pytest.raises(PipelineError, match="uint8"):
        Preprocess()(IMAGES.float())
