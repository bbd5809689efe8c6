"""Small images of a model card, cut from its sheet and written anew: what reaches a page was made here."""

import base64
import io
import warnings
from functools import cache

from PIL import Image

from pipeline.pages.facts import Tiles

LARGEST = 40_000_000  # pixels


class Sheet:
    """The images of a sheet as data URIs; a number that is not on it gives none."""

    def __init__(self, content: bytes | None, tiles: Tiles) -> None:
        self._tiles, self._image = tiles, _open(content)
        self.uri = cache(self._cut)

    def uris(self, numbers: list[int]) -> tuple[str, ...]:
        return tuple(uri for number in numbers if (uri := self.uri(number)) is not None)

    def first(self, numbers: list[int]) -> str | None:
        return next(iter(self.uris(numbers)), None)

    def _cut(self, number: int) -> str | None:
        if self._image is None or number >= self._tiles.count:
            return None
        width, height = self._tiles.width, self._tiles.height
        left, top = number % self._tiles.columns * width, number // self._tiles.columns * height
        if left + width > self._image.width or top + height > self._image.height:
            return None
        part = self._image.crop((left, top, left + width, top + height))
        buffer = io.BytesIO()
        kind = "png" if part.mode == "L" else "jpeg"  # drawings, photographs
        part.save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 85}))
        return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _open(content: bytes | None) -> Image.Image | None:
    if content is None:
        return None
    try:
        with warnings.catch_warnings(action="error"):  # of an image that unpacks to gigabytes
            image = Image.open(io.BytesIO(content), formats=("PNG",))
            if image.width * image.height > LARGEST:
                return None
            return image.convert("L" if image.mode in ("L", "1") else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning):
        return None
