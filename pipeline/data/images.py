"""Image files to tensors of one shape."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

MODES = {1: "L", 3: "RGB"}


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert to "L" or "RGB" without surprises from transparency or deep greys."""
    if image.mode == mode:
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:  # transparent is white paper, not black
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(paper, image)
    elif image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):  # Pillow clips deep greys at 255: scale them instead
        deep = np.asarray(image, dtype=np.float64)
        top = 65535.0 if deep.max(initial=0) > 255 else 255.0
        image = Image.fromarray(np.clip(deep / top * 255.0, 0, 255).astype(np.uint8))
    return image.convert(mode)


def to_array(image: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """Convert to the channels and size of ``shape``: uint8 [C, H, W], a read-only view of pixels in rows.

    An image of another size is cut to its largest central part of the right proportions and resized bilinearly,
    with antialiasing: every pixel of the part contributes.
    """
    channels, height, width = shape
    image = to_mode(image, MODES[channels])
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        part_width, part_height = max(1, round(width * scale)), max(1, round(height * scale))
        left, top_edge = (image.width - part_width) // 2, (image.height - part_height) // 2
        if (part_width, part_height) != image.size:  # cut first: what is cut away must not shine in
            image = image.crop((left, top_edge, left + part_width, top_edge + part_height))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.frombuffer(image.tobytes(), dtype=np.uint8).reshape(height, width, channels).transpose(2, 0, 1)


def upright(image: Image.Image) -> Image.Image:
    """Turn a photograph as its camera noted that it was held."""
    if "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return ImageOps.exif_transpose(image)
    return image


def decode(content: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """Decode an image file (bytes or buffer) to uint8 [C, H, W]."""
    with Image.open(io.BytesIO(content)) as image:
        return to_array(upright(image), shape)
