"""PNGs by the fast reader: what it takes is what Pillow reads; all else is left to Pillow."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.data import images, png
from pipeline.data.sources.files import Rule, Unusable, decode

SHAPES = [(1, 9, 7), (3, 9, 7), (3, 32, 32), (3, 84, 84), (1, 1, 1)]


def drawn(shape: tuple[int, int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape[1:], shape[0]), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if shape[0] == 1 else pixels)


def encoded(image: Image.Image, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG", **options)
    return sink.getvalue()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("level", [0, 1, 9])
def test_pixels_are_pillows(shape, level) -> None:
    note = PngInfo()
    note.add_text("made", "by hand")
    note.add(b"gAMA", (30_000).to_bytes(4))
    for options in ({}, {"pnginfo": note, "dpi": (300, 300)}):
        content = encoded(drawn(shape), compress_level=level, **options)
        assert np.array_equal(png.read_plain(content, shape), images.decode(content, shape))


def test_what_is_more_than_pixels_is_left_to_pillow() -> None:
    image, shape = drawn((3, 9, 7)), (3, 9, 7)
    turned = Image.Exif()
    turned[0x0112] = 6
    others = {
        "exif": encoded(image, exif=turned),
        "transparent": encoded(image, transparency=(1, 2, 3)),
        "frames": encoded(image, save_all=True, append_images=[drawn(shape, 1)]),
        "alpha": encoded(image.convert("RGBA")),
        "grey": encoded(image.convert("L")),
        "palette": encoded(image.convert("P")),
        "bits": encoded(image.convert("1")),
        "deep": encoded(Image.fromarray(np.arange(63, dtype=np.uint16).reshape(9, 7) * 1000)),
        "size": encoded(drawn((3, 7, 9))),
    }
    sink = io.BytesIO()
    image.save(sink, "BMP")
    others["format"] = sink.getvalue()
    for name, content in others.items():
        assert png.read_plain(content, shape) is None, name
        assert np.array_equal(png.decode(content, shape), images.decode(content, shape)), name


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SHAPES[:2]), st.sampled_from(["flip", "cut", "insert", "remove", "repeat"]), st.data())
def test_damage_is_left_to_pillow(shape, how, data) -> None:
    content = bytearray(encoded(drawn(shape)))
    where = data.draw(st.integers(0, len(content) - 1))
    match how:
        case "flip":
            content[where] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del content[where:]
        case "insert":
            content[where:where] = data.draw(st.binary(min_size=1, max_size=9))
        case "remove":
            del content[where]
        case "repeat":
            content[where:where] = content[33:-12]
    found = png.read_plain(bytes(content), shape)
    assert found is None or np.array_equal(found, images.decode(bytes(content), shape))


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_any_packed_bytes_are_pixels_or_none(packed) -> None:
    """Checksums that hold over bytes that mean nothing."""
    content = encoded(drawn((3, 9, 7)))

    def chunk(kind: bytes, inside: bytes) -> bytes:
        return len(inside).to_bytes(4) + kind + inside + zlib.crc32(kind + inside).to_bytes(4)

    for inside in (packed, zlib.compress(packed)):
        found = png.read_plain(content[:33] + chunk(b"IDAT", inside) + chunk(b"IEND", b""), (3, 9, 7))
        assert found is None or found.shape == (3, 9, 7)


def test_rules_hold_for_the_fast_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode and size that a rule asks for, its inversion and the file that is kept."""
    shape, content = (3, 9, 7), encoded(drawn((3, 9, 7)))
    pixels = images.decode(content, shape)
    with monkeypatch.context() as alone:
        alone.setattr("pipeline.data.images.open_image", None)  # Pillow is not asked
        taken, kept = decode(content, Rule(shape, frozenset({"RGB"}), (7, 9)))
        assert np.array_equal(taken, pixels) and kept == b""
        assert np.array_equal(decode(content, Rule(shape, invert=True))[0], 255 - pixels)
        taken, kept = decode(content, Rule(shape), keep_file=True)
        assert np.array_equal(taken, pixels) and kept == content
    for rule, reason in ((Rule(shape, frozenset({"L"})), "wrong_mode"), (Rule(shape, size=(9, 7)), "wrong_size")):
        with pytest.raises(Unusable) as problem:
            decode(content, rule)
        assert problem.value.reason == reason
