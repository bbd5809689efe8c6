"""Exported images come back pixel for pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.dataset import Dataset, class_table
from pipeline.data.images import decode
from pipeline.data.write import write_dataset
from pipeline.demo import export_images
from pipeline.errors import PipelineError


@pytest.mark.parametrize("channels", [1, 3])
def test_exported_images_are_the_datasets(tmp_path: Path, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, channels, 8, 8)).astype(np.uint8)
    names = ["Latin/a", "Latin/b", "c"]
    uri = str(tmp_path / "set")
    write_dataset(uri, "set", zip(names, pixels, strict=True), {"train": names[:1], "test": names[1:]})
    dataset = Dataset(uri)
    table = class_table(dataset.manifest, "test")
    written = export_images(dataset, table, [0, 1], slice(2, 5), tmp_path / "out")
    assert [str(file.relative_to(tmp_path / "out")) for file in written] == [
        f"{name}/{number:04d}.png" for name in ("Latin-b", "c") for number in (2, 3, 4)
    ]
    read = np.stack([decode(file.read_bytes(), dataset.shape) for file in written])
    assert np.array_equal(read, pixels[1:, 2:5].reshape(-1, channels, 8, 8))
    with pytest.raises(PipelineError, match="has 2 classes"):
        export_images(dataset, table, [2], slice(0, 1), tmp_path / "out")
