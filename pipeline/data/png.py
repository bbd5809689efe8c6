"""PNG files that need no conversion, in half of Pillow's time, which is most of an ingest of small images."""

import zlib
from functools import cache

import numpy as np
import pyspng

from pipeline.data import images

Shape = tuple[int, int, int]

_COLOURS = {1: 0, 3: 2}  # PNG's number for grey and for red, green and blue
_MORE = (b"tRNS", b"eXIf", b"acTL")  # transparency, how the camera was held, frames: more than pixels


def decode(content: bytes, shape: Shape) -> np.ndarray:
    """Decode a file of a dataset, of any format and number of pixels, as :func:`pipeline.data.images.decode`."""
    plain = read_plain(content, shape)
    return images.decode(content, shape, max_pixels=None) if plain is None else plain


def read_plain(content: bytes, shape: Shape) -> np.ndarray | None:
    """Pixels uint8 [C, H, W] of a PNG of exactly that shape, the same as Pillow's.

    None for all that Pillow has to judge: other files, more than pixels in them, damage. PNG's checksums tell damage;
    the one inside the compressed stream, which Pillow reads too, is not looked at.
    """
    if not content.startswith(_begin(shape)) or not _whole_and_plain(content):
        return None
    try:
        pixels: np.ndarray = pyspng.load(content)
    except (ValueError, RuntimeError):
        return None
    channels, height, width = shape
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


@cache
def _begin(shape: Shape) -> bytes:
    """How such a file begins: its size, eight bits a channel, the colours, not interlaced."""
    channels, height, width = shape
    about = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + bytes([8, _COLOURS[channels], 0, 0, 0])
    return images.PNG_SIGNATURE + (13).to_bytes(4) + about


def _whole_and_plain(content: bytes) -> bool:
    """Whether every chunk is what its checksum says (the decoder does not look) and there are pixels alone."""
    start, kind = len(images.PNG_SIGNATURE), b""
    while kind != b"IEND":
        end = start + 8 + int.from_bytes(content[start : start + 4])
        chunk = content[start + 4 : end]
        kind = chunk[:4]
        if len(kind) < 4 or kind in _MORE or zlib.crc32(chunk) != int.from_bytes(content[end : end + 4]):
            return False
        start = end + 4
    return True
