"""Image files to tensors of one shape."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

MODES = {1: "L", 3: "RGB"}


def to_array(image: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """Convert to the channels and size of ``shape``: uint8 [C, H, W], central square crop first when it resizes."""
    channels, height, width = shape
    if image.mode != MODES[channels]:
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:  # transparent is white paper, not black
            image = image.convert("RGBA")
            paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(paper, image)
        elif image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):  # Pillow clips deep greys at 255: scale them instead
            deep = np.asarray(image, dtype=np.float64)
            top = 65535.0 if deep.max(initial=0) > 255 else 255.0
            image = Image.fromarray(np.clip(deep / top * 255.0, 0, 255).astype(np.uint8))
        image = image.convert(MODES[channels])
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        box_width, box_height = width * scale, height * scale
        left, top_edge = (image.width - box_width) / 2, (image.height - box_height) / 2
        box = (left, top_edge, left + box_width, top_edge + box_height)
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def decode(content: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """Decode an image file (bytes or buffer) to uint8 [C, H, W]."""
    with Image.open(io.BytesIO(content)) as image:
        return to_array(image, shape)
