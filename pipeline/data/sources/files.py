"""Sources whose images are files: read in tasks from folders or by offset from zip archives, then decoded."""

import hashlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.data import images, png
from pipeline.data.archives import BadMember, Member, ZipReader, open_zip
from pipeline.data.sources.base import Chunk, Plan, Shape, Skip, Source, small_class
from pipeline.data.sources.tree import Classes, Entry, absolute
from pipeline.errors import PipelineError, check_choice

MOST = 8
KEPT_FORMATS = ("PNG", "JPEG", "MPO", "WEBP")  # MPO: JPEG with more pictures behind it, as phones write it
# Position of the class, its name, the file: Entry and Member as plain tuples, which are pickled ten times faster.
Order = list[tuple[int, str, tuple[str, str, tuple[Any, ...] | None]]]


@dataclass(frozen=True)
class Rule:
    """Which images are taken and what becomes of them."""

    shape: Shape
    modes: frozenset[str] | None = None  # of Pillow; None: every mode that can be converted
    size: tuple[int, int] | None = None  # width and height that every image must have; None: any
    invert: bool = False  # ink becomes bright
    max_pixels: int = images.MAX_PIXELS  # of one image: larger ones are left out

    @classmethod
    def asked(cls, shape: Sequence[int], encoding: str, min_images: int, max_pixels: int = images.MAX_PIXELS) -> Self:
        """Of what a user asked for a source of photographs; refuses what cannot be."""
        if len(shape) != 3 or shape[0] not in (1, 3) or any(not isinstance(n, int) or n < 1 for n in shape):
            raise PipelineError(f"data.source.shape={list(shape)} is not [1 or 3, height, width]")
        check_choice("data.source.encoding", encoding, ("raw", "encoded"))
        for key, number in (("max_pixels", max_pixels), ("min_images", min_images)):
            if type(number) is not int or number < 1:
                raise PipelineError(f"data.source.{key}={number} is no positive whole number")
        return cls(shape=(shape[0], shape[1], shape[2]), max_pixels=max_pixels)


class Unusable(Exception):
    """An image that is left out: the reason's name and its detail."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class FileSource(Source):
    """A source that reads files by a rule. Subclasses find the files of every class.

    Args:
        path: a folder or an archive, as it was given; None is refused.
        needed: what it must hold, for messages.
    """

    rule: Rule

    def __init__(self, path: str | None, needed: str) -> None:
        if path is None:
            raise PipelineError(f"data.source.path must be given: {needed}")
        self.given, self.path = path, absolute(path)

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.rule.shape

    @property
    def archives(self) -> list[str]:
        return [self.path] if os.path.isfile(self.path) else []

    def without_small(self, entries: Classes, skipped: list[Skip]) -> Classes:
        """The classes that have ``min_images`` files; the others are noted in ``skipped``."""
        small = {name: len(files) for name, files in entries.items() if len(files) < self.min_images}
        skipped += [small_class(name, count, self.min_images) for name, count in small.items()]
        return {name: files for name, files in entries.items() if name not in small}

    def plan_files(
        self, entries: Classes, chosen: dict[str, list[str]], chunk_rows: int, skipped: list[Skip], **source: Any
    ) -> Plan:
        """The plan of the files of all classes of the splits ``chosen``; ``source``: for the manifest."""
        classes = sorted(name for names in chosen.values() for name in names)
        orders = (cut_by_name if self.grows else cut)(entries, classes, chunk_rows)
        source = {"path": self.given, **source}
        if self.rule.max_pixels > images.MAX_PIXELS:  # for the model that is trained on them
            source["max_pixels"] = self.rule.max_pixels
        return Plan(
            classes, chosen, orders, source, images=sum(map(len, orders)), skipped=skipped, archives=self.archives
        )

    def read(self, order: Order, chunk_rows: int) -> Iterator[Chunk]:
        for start in range(0, len(order), chunk_rows):
            yield self._read(order[start : start + chunk_rows])

    def _read(self, order: Order) -> Chunk:
        pixels = np.empty((len(order), *self.shape), dtype=np.uint8)
        classes: list[int] = []
        names: list[str] = []
        digests: list[bytes] = []
        files: list[bytes] = []
        skipped: list[Skip] = []
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about a file: what cannot be used is listed
            archives: dict[str, ZipReader] = {}
            for position, class_name, (name, container, member) in order:
                entry = Entry(name, container, Member._make(member) if member else None)
                try:
                    content = content_of(entry, archives, stack)
                    pixels[len(names)], kept = decode(content, self.rule, self.encoding == "encoded")
                except Unusable as problem:
                    skipped.append(Skip(entry.name, class_name, problem.reason, problem.detail))
                    continue
                classes.append(position)
                names.append(entry.name)
                digests.append(hashlib.blake2b(content, digest_size=16).digest())
                if self.encoding == "encoded":
                    files.append(kept)
        rows = np.asarray(classes, dtype=np.int32)
        kept_files = files if self.encoding == "encoded" else None
        return Chunk(pixels[: len(names)], rows, names, digests, kept_files, skipped)


def cut(entries: Mapping[str, Sequence[Entry]], classes: Sequence[str], chunk_rows: int) -> list[Order]:
    """The files of all classes, in the order of ``classes``, in orders of ``chunk_rows`` images."""
    rows: Order = [
        (position, name, (entry.name, entry.container, tuple(entry.member) if entry.member else None))
        for position, name in enumerate(classes)
        for entry in entries[name]
    ]
    return [rows[start : start + chunk_rows] for start in range(0, len(rows), chunk_rows)]


def cut_by_name(entries: Mapping[str, Sequence[Entry]], classes: Sequence[str], rows: int) -> list[Order]:
    """The files of all classes, in the order of ``classes``, in orders of ``rows`` images on average.

    An order begins at every file whose name's hash says so, whatever stands before it: new files change the order
    that they fall into, and no other. None is longer than ``MOST`` times the average.
    """
    [whole] = cut(entries, classes, sys.maxsize) or [[]]
    orders: list[Order] = []
    for row in whole:
        number = int.from_bytes(hashlib.blake2b(row[2][0].encode(), digest_size=8).digest())
        if not orders or number % rows == 0 or len(orders[-1]) == MOST * rows:
            orders.append([])
        orders[-1].append(row)
    return orders


def decode(content: bytes, rule: Rule, keep_file: bool = False) -> tuple[np.ndarray, bytes]:
    """Decode an image file by ``rule``: uint8 [C, H, W], and the bytes to keep. Raises Unusable."""
    try:
        plain = _plain(content, rule)
        if plain is not None:
            return (255 - plain if rule.invert and not keep_file else plain), content if keep_file else b""
        image = images.open_image(content, rule.max_pixels)
        if rule.modes is not None and image.mode not in rule.modes:
            raise Unusable("wrong_mode", f"is {image.mode}, not {' or '.join(sorted(rule.modes))}")
        if rule.size is not None and image.size != rule.size:
            raise Unusable("wrong_size", f"is {image.width}x{image.height}, not {rule.size[0]}x{rule.size[1]}")
        standing = images.standing(image)
        pixels = images.to_array(standing, rule.shape)
        if not keep_file:
            return (255 - pixels if rule.invert else pixels), b""
        return pixels, content if image.format in KEPT_FORMATS else _as_png(standing, rule.shape[0])
    except Unusable:
        raise
    except images.UnknownRange as error:
        raise Unusable("unknown_range", f"holds {error}") from error
    except (images.TooLarge, Image.DecompressionBombError) as error:
        raise Unusable("too_large", str(error)) from error
    except MemoryError as error:
        raise Unusable("too_large", "does not fit into memory") from error
    except UnidentifiedImageError as error:
        raise Unusable("unreadable", "is no image that Pillow knows") from error
    except Exception as error:  # a broken file can make a decoder fail in any way
        detail = " ".join(str(error).split())
        if "conversion from" in detail:
            raise Unusable("wrong_mode", detail) from error
        raise Unusable("truncated" if "truncated" in detail.lower() else "unreadable", detail) from error


def _plain(content: bytes, rule: Rule) -> np.ndarray | None:
    """Pixels of a file that needs nothing of what :func:`decode` does to others."""
    channels, height, width = rule.shape
    if rule.modes is not None and images.MODES[channels] not in rule.modes:
        return None
    return png.read_plain(content, rule.shape) if rule.size in (None, (width, height)) else None


def content_of(entry: Entry, archives: dict[str, ZipReader], stack: ExitStack) -> bytes:
    """The bytes of a file; ``archives`` that are open are used again, and closed with ``stack``. Raises Unusable."""
    try:
        if entry.member is None:
            content = Path(entry.container).read_bytes()
        else:
            if entry.container not in archives:
                archives[entry.container] = stack.enter_context(open_zip(entry.container))
            content = archives[entry.container].read(entry.member)
    except BadMember as error:
        raise Unusable("unreadable", str(error)) from error
    except OSError as error:
        if entry.member is not None:
            where = f"{entry.container} cannot be read on this node"
            raise PipelineError(f"{where} ({error}); put it where all nodes see it") from error
        raise Unusable("unreadable", error.strerror or str(error)) from error
    if not content:
        raise Unusable("zero_size")
    return content


def _as_png(image: Image.Image, channels: int) -> bytes:
    """Formats that the stream does not decode are kept as PNG, without loss."""
    sink = io.BytesIO()
    image.convert(images.MODES[channels]).save(sink, "PNG")
    return sink.getvalue()
