"""Pixels of image files: depth, transparency and range as the format says, not as one image happens to look."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from pipeline.data import images, png
from pipeline.data.sources.files import Rule, Unusable, decode


def chunk(kind: bytes, inside: bytes) -> bytes:
    return struct.pack(">I", len(inside)) + kind + inside + struct.pack(">I", zlib.crc32(kind + inside))


def png_file(samples: np.ndarray, depth: int, transparent: tuple[int, ...] | None = None, exif: bytes = b"") -> bytes:
    """A PNG of samples [H, W] or [H, W, 3], written byte by byte as the specification says; EXIF behind the pixels."""
    height, width = samples.shape[:2]
    flat = samples.reshape(height, -1)
    if depth == 16:
        rows = [line.astype(">u2").tobytes() for line in flat]
    else:
        bits = np.unpackbits(flat.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = [np.packbits(line).tobytes() for line in bits.reshape(height, -1)]
    header = struct.pack(">IIBBBBB", width, height, depth, 2 if samples.ndim == 3 else 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header)]
    if transparent is not None:
        parts.append(chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    parts.append(chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))))
    if exif:
        parts.append(chunk(b"eXIf", exif))
    return images.PNG_SIGNATURE + b"".join(parts) + chunk(b"IEND", b"")


def tiff_file(pixels: np.ndarray, **tags: object) -> bytes:
    sink = io.BytesIO()
    about = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        about[int(tag[1:])] = value
    Image.fromarray(pixels).save(sink, "TIFF", tiffinfo=about)
    return sink.getvalue()


@pytest.mark.parametrize("top", [65535, 4000, 255, 200, 1])
def test_sixteen_bits_are_scaled_by_the_format_not_by_the_image(top: int) -> None:
    """The same ramp, cut at different heights, is the same grey wherever the values are the same."""
    ramp = np.linspace(0, top, 64).astype(np.uint16).reshape(8, 8)
    expected = np.floor(ramp / 65535 * 255).astype(np.uint8)
    for content in (png_file(ramp, 16), tiff_file(ramp)):
        np.testing.assert_array_equal(images.decode(content, (1, 8, 8))[0], expected)
        np.testing.assert_array_equal(images.decode(content, (3, 8, 8)), np.broadcast_to(expected, (3, 8, 8)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_white(depth: int, channels: int) -> None:
    top = 2**depth - 1
    values = np.unique(np.linspace(0, top, 8).astype(np.uint16))
    samples = np.tile(values, (4, 1))
    for clear in {int(values[0]), int(values[len(values) // 2])}:
        pixels = images.decode(png_file(samples, depth, (clear,)), (channels, *samples.shape))
        expected = np.where(samples == clear, 255, np.floor(samples / top * 255)).astype(np.uint8)
        np.testing.assert_array_equal(pixels, np.broadcast_to(expected, pixels.shape))


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_is_white_and_its_neighbour_is_not(depth: int) -> None:
    unit = 257 if depth == 16 else 1
    samples = np.full((4, 4, 3), (10 * unit, 20 * unit, 30 * unit))
    samples[:, 2:, 2] += 1  # in the lowest bit
    clear = tuple(int(value) for value in samples[0, 0])
    content = png_file(samples, depth, clear)
    pixels = images.decode(content, (3, 4, 4))
    assert (pixels[:, :, :2] == 255).all()
    assert pixels[:2, 0, 3].tolist() == [10, 20] and pixels[2, 0, 3] == (31 if depth == 8 else 30)
    grey = images.decode(content, (1, 4, 4))
    assert (grey[0, :, :2] == 255).all() and (grey[0, :, 2:] < 30).all()
    np.testing.assert_array_equal(png.decode(content, (3, 4, 4)), pixels)


def test_twelve_bits_and_white_that_is_zero() -> None:
    """TIFF: samples of 12 bits are packed two in three bytes; photometric 0 counts from white to black."""
    samples = np.asarray([[0, 4095], [2048, 1024]], dtype=np.uint16)
    packed = bytearray()
    for first, second in samples.tolist():
        packed += bytes([first >> 4, (first & 15) << 4 | second >> 8, second & 255])
    entries = [(256, 2), (257, 2), (258, 12), (259, 1), (262, 1), (273, 0), (277, 1), (278, 2), (279, len(packed))]
    start = 8 + 2 + 12 * len(entries) + 4
    body = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in entries)
    content = b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0) + bytes(packed)
    assert images.decode(content, (1, 2, 2)).tolist() == [[[0, 255], [127, 63]]]
    inverted = tiff_file(np.full((4, 4), 65535, dtype=np.uint16), t262=0)
    assert (images.decode(inverted, (1, 4, 4)) == 0).all()


@pytest.mark.parametrize("pixels", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70_000, np.int32)])
def test_numbers_without_a_range_are_left_out_with_the_reason(pixels: np.ndarray) -> None:
    with pytest.raises(images.UnknownRange, match="save it with 8 or 16 bits"):
        images.decode(tiff_file(pixels), (1, 4, 4))
    with pytest.raises(Unusable, match="unknown_range"):
        decode(tiff_file(pixels), Rule((3, 4, 4)))


@pytest.mark.parametrize("encoding", ["raw", "encoded"])
def test_a_tiff_of_lab_is_grey_as_its_colours_are(encoding: str) -> None:
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    sink = io.BytesIO()
    colours.convert("LAB").save(sink, "TIFF")
    shown = Image.fromarray(images.decode(sink.getvalue(), (3, 8, 8)).transpose(1, 2, 0))
    pixels, kept = decode(sink.getvalue(), Rule((1, 8, 8)), encoding == "encoded")
    np.testing.assert_array_equal(pixels[0], np.asarray(shown.convert("L")))
    assert not kept or np.array_equal(png.decode(kept, (1, 8, 8)), pixels)


def test_the_kept_file_is_decoded_to_the_same_pixels() -> None:
    """Encoded datasets keep PNG, JPEG and WebP as they are and the rest as PNG: reading them again changes nothing."""
    ramp = np.linspace(0, 900, 64).astype(np.uint16).reshape(8, 8)
    colour = np.random.default_rng(0).integers(0, 65536, (8, 8, 3))
    for content in (
        tiff_file(ramp),
        png_file(ramp, 16),
        png_file(colour, 16, tuple(colour[0, 0].tolist())),
        png_file(ramp % 4, 2, (3,)),
    ):
        for shape in ((1, 8, 8), (3, 8, 8), (3, 5, 6)):
            pixels, kept = decode(content, Rule(shape), keep_file=True)
            np.testing.assert_array_equal(png.decode(kept, shape), pixels)


def test_a_phones_photograph_is_kept_as_the_file_that_it_is() -> None:
    """JPEG with a second picture behind it, of which Pillow says MPO; as PNG it would be many times as large."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 9, 3), dtype=np.uint8)
    first, second = map(Image.fromarray, pixels)
    sink, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    first.save(sink, "MPO", save_all=True, append_images=[second], exif=exif.tobytes())
    assert Image.open(io.BytesIO(sink.getvalue())).format == "MPO"
    taken, kept = decode(sink.getvalue(), Rule((3, 9, 6)), keep_file=True)
    assert kept == sink.getvalue()
    np.testing.assert_array_equal(png.decode(kept, (3, 9, 6)), taken)


def test_a_turn_noted_behind_the_pixels_counts_everywhere() -> None:
    """Cameras' PNGs may hold EXIF after the pixels; ingest, datasets and classification must agree."""
    samples = np.zeros((4, 4), dtype=np.uint8)
    samples[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    content = png_file(samples, 8, exif=exif.tobytes()[6:])
    taken, _ = decode(content, Rule((1, 4, 4)))
    assert taken[0, 0, 3] == 255 and taken.sum() == 255
    np.testing.assert_array_equal(images.decode(content, (1, 4, 4)), taken)


@pytest.mark.parametrize("exif", [b"Exif\0\0" + bytes(20), b"garbage!", b"MM\0*\0\0\0\x08\0\x05", b"II"], ids=repr)
def test_a_photograph_whose_notes_are_damaged_is_taken_as_it_lies(exif: bytes) -> None:
    """Every viewer shows it, and JPEG was taken, by the way in which Pillow looks at its resolution."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "WEBP", lossless=True, exif=exif)
    for content in (png_file(pixels, 8, exif=exif), sink.getvalue()):
        np.testing.assert_array_equal(decode(content, Rule((3, 4, 6)))[0], pixels.transpose(2, 0, 1))


def test_the_limit_of_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset's own files were judged when it was made: they are read whatever Pillow's limit says."""
    sink = io.BytesIO()
    Image.new("RGB", (50, 40)).save(sink, "JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(images.TooLarge, match="50 x 40 pixels, more than 1,999"):
        images.decode(sink.getvalue(), (3, 8, 8), max_pixels=1999)
    assert images.decode(sink.getvalue(), (3, 8, 8), max_pixels=2000).shape == (3, 8, 8)
    assert png.decode(sink.getvalue(), (3, 8, 8)).shape == (3, 8, 8)
