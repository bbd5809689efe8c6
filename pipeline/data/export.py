"""Images of an ingested dataset as files again, one folder a class: to look at, or to try a registered model on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.dataset import ClassTable, Dataset
from pipeline.errors import PipelineError


def export_images(
    dataset: Dataset, table: ClassTable, classes: Sequence[int], images: slice, folder: str | Path
) -> list[Path]:
    """Write ``images`` (a range within each class) of the classes at these positions of ``table`` as PNG files.

    They are named ``folder/CLASS/NUMBER.png``. Classes are written as they lie in the shards, without rotation.
    """
    written = []
    for position in classes:
        if not 0 <= position < len(table):
            raise PipelineError(f"class {position} of split {table.split!r}, which has {len(table)} classes")
        numbers = np.arange(table.counts[position])[images]
        target = Path(folder) / _folder_name(dataset, int(table.ids[position]))
        target.mkdir(parents=True, exist_ok=True)
        for number, pixels in zip(numbers, dataset.gather(table.starts[position] + numbers), strict=True):
            written.append(target / f"{number:04d}.png")
            _picture(pixels).save(written[-1])
    return written


def _folder_name(dataset: Dataset, class_id: int) -> str:
    return dataset.manifest.class_names[class_id // len(dataset.manifest.rotations)].replace("/", "-")


def _picture(pixels: np.ndarray) -> Image.Image:
    """uint8 [C, H, W] with one or three channels."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
