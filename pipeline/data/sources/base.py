"""What a source is: a plan of its classes, and work orders that tasks anywhere turn into images."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, int, int]
Report = Callable[[str], None]


class Skip(NamedTuple):
    """A file that was left out, or kept in spite of something."""

    file: str
    class_name: str
    reason: str
    detail: str = ""


# Reasons that do not speak against the input: they are listed, but not held against ``max_skipped_fraction``.
HARMLESS = frozenset({"hidden", "linked_again", "small_class", "not_in_split", "empty_class", "near_copy"})


def small_class(name: str, images: int, least: int) -> Skip:
    """A class that ``min_images`` leaves out."""
    return Skip("", name, "small_class", f"has {images} usable images, fewer than data.source.min_images={least}")


@dataclass
class Chunk:
    """Images in the order of their rows, and what was left out on the way.

    images   uint8 [n, C, H, W], for the rows and their statistics
    classes  int32 [n], positions in ``Plan.classes``, never falling
    names    [n] what a user knows the images by
    digests  [n] of their content: equal digests are duplicates
    files    [n] the image files themselves when the dataset keeps them encoded, else None
    """

    images: np.ndarray
    classes: np.ndarray
    names: list[str]
    digests: list[bytes]
    files: list[bytes] | None = None
    skipped: list[Skip] = field(default_factory=list)


@dataclass
class Plan:
    """What a source will give, known before a pixel is read."""

    classes: list[str]  # in the order of their rows
    splits: dict[str, list[str]]
    orders: list[Any]  # work orders, in the order of their rows
    source: dict[str, Any]  # for the manifest: where the images come from
    rotations: tuple[int, ...] = (0,)
    images: int | None = None  # how many are expected, where it is known
    skipped: list[Skip] = field(default_factory=list)  # left out before reading
    archives: list[str] = field(default_factory=list)  # files whose SHA-256 the manifest records


class Source(ABC):
    """Images of a dataset. A source is sent to tasks: it holds settings, not data."""

    shape: Shape
    encoding: str = "raw"
    # Benchmarks keep duplicates, because published numbers include them; elsewhere they leak between the splits.
    keep_duplicates: bool = True
    # Every order of the plan is a shard, cut where the names of its files say: new files change few shards.
    grows: bool = False
    # Classes with fewer images are left out.
    min_images: int = 1
    # The splits of the dataset that is replaced (class -> split): a class that is trained on is never tested on later.
    kept: Mapping[str, str] = {}  # noqa: RUF012 (replaced, never changed)

    @abstractmethod
    def plan(self, chunk_rows: int, report: Report) -> Plan:
        """List the classes and cut the work into orders of about ``chunk_rows`` images; ``report`` shows a line."""

    @abstractmethod
    def read(self, order: Any, chunk_rows: int) -> Iterator[Chunk]:
        """Carry out one order of the plan, in chunks of at most ``chunk_rows`` images."""
