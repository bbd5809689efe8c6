"""Image files to tensors of one shape."""

import io
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

MODES = {1: "L", 3: "RGB"}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PIXELS = 89_478_485  # of one image, unless told otherwise: 256 MiB of RGB, where Pillow begins to warn

_BITS, _WHITE_IS_ZERO = 258, 262  # TIFF's tags BitsPerSample and PhotometricInterpretation
_PNG_DEPTH, _PNG_COLOUR = 24, 25  # where a PNG says how many bits a sample has, and whether it has colours
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_limit_lock = threading.Lock()  # Pillow's limit belongs to the whole process


class TooLarge(ValueError):
    """An image of more pixels than are taken."""


class UnknownRange(ValueError):
    """An image whose numbers do not tell which of them is white."""


def decode(content: Any, shape: tuple[int, int, int], max_pixels: int | None = MAX_PIXELS) -> np.ndarray:
    """Decode an image file (bytes or buffer) to uint8 [C, H, W].

    Raises:
        TooLarge: it has more than ``max_pixels`` pixels (None: any number is taken).
        UnknownRange: floating-point numbers, or integers of 32 bits.
        Exception: of Pillow's decoders, which fail in many ways on a damaged file.
    """
    return to_array(standing(open_image(content, max_pixels)), shape)


def open_image(content: Any, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """``Image.open``, but what begins as PNG goes to that decoder at once, and the limit of pixels is the caller's."""
    image: Image.Image
    if bytes(content[: len(PNG_SIGNATURE)]) == PNG_SIGNATURE:
        image = PngImageFile(io.BytesIO(content))
        _mend_transparency(image, content)
    else:
        image = _whatever_size(lambda: Image.open(io.BytesIO(content)))  # reads the header only
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise TooLarge(f"{image.width} x {image.height} pixels, more than {max_pixels:,}")
    return image


def standing(image: Image.Image) -> Image.Image:
    """Eight bits a channel, transparent parts on white paper, turned as the camera noted that it was held."""
    image.load()  # PNG may note the turn behind the pixels
    turn = _turn(image) if "exif" in image.info else None
    if image.mode == "LAB":  # of which Pillow makes colours, and no greys
        image = image.convert("RGB")
    image = _on_white(_eight_bits(image))
    return image if turn is None else image.transpose(turn)


def to_array(image: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """Convert what :func:`standing` gave to the channels and size of ``shape``: uint8 [C, H, W], a read-only view of
    pixels in rows.

    An image of another size is cut to its largest central part of the right proportions and resized bilinearly,
    with antialiasing: every pixel of the part contributes.
    """
    channels, height, width = shape
    if image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        part_width, part_height = max(1, round(width * scale)), max(1, round(height * scale))
        left, top_edge = (image.width - part_width) // 2, (image.height - part_height) // 2
        if (part_width, part_height) != image.size:  # cut first: what is cut away must not shine in
            part = (left, top_edge, left + part_width, top_edge + part_height)
            image = _whatever_size(partial(image.crop, part))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.frombuffer(image.tobytes(), dtype=np.uint8).reshape(height, width, channels).transpose(2, 0, 1)


def resized(pixels: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Stored pixels uint8 [C, H, W] as :func:`to_array` gives an image of them."""
    return to_array(Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)), shape)


def _whatever_size(action: Callable[[], Image.Image]) -> Image.Image:
    """What ``action`` returns, where Pillow's own limit of pixels would forbid it: :func:`open_image` has judged."""
    try:
        return action()
    except Image.DecompressionBombError:
        with _limit_lock:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return action()
            finally:
                Image.MAX_IMAGE_PIXELS = limit


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What sets an image upright; None where it is, or where the camera's notes are damaged, which no viewer minds."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # in as many ways as notes can be broken
        return None


def _mend_transparency(image: Image.Image, content: Any) -> None:
    """PNG names the transparent colour as the file stores it; Pillow scales the pixels and leaves the colour."""
    key, depth, colour = image.info.get("transparency"), content[_PNG_DEPTH], content[_PNG_COLOUR]
    if isinstance(key, int) and image.mode == "L" and depth in (2, 4):
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif isinstance(key, tuple) and depth == 16 and colour == 2:
        # Pillow keeps the high byte of every sample; read as if they were swapped, it keeps the low one.
        low = PngImageFile(io.BytesIO(content))
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        high_bytes, low_bytes = np.asarray(image), np.asarray(low)
        del image.info["transparency"]
        clear = (high_bytes * np.uint16(256) + low_bytes == np.asarray(key)).all(axis=-1)
        image.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep greys scaled by the depth of their format; Pillow would clip them at 255."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    tags = getattr(image, "tag_v2", {})
    known = image.mode != "F" and image.format in ("PNG", "TIFF", "JPEG2000", "PPM")
    if not known or (image.format == "TIFF" and image.mode == "I"):
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
        raise UnknownRange(f"{kind} numbers, which do not say what is white; save it with 8 or 16 bits a channel")
    deep = np.asarray(image, dtype=np.float64)
    top = 2.0 ** tags.get(_BITS, (16,))[0] - 1
    grey = np.clip(deep / top * 255.0, 0, 255).astype(np.uint8)
    if tags.get(_WHITE_IS_ZERO) == 0:
        grey = 255 - grey
    if "transparency" in image.info:
        grey[deep == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(paper, image.convert("RGBA"))
