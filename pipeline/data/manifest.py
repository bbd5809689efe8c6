"""The manifest of a dataset: what its shards hold, in one JSON file."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from pipeline.errors import PipelineError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
FEATURES = "features"  # an encoding
ENCODINGS = ("raw", "encoded", FEATURES)
_OF_FEATURES = ("network", "views")


def turned_name(name: str, turn: int) -> str:
    """The name of a class of features that is another one turned."""
    return f"{name} {turn}°" if turn else name


@dataclass(frozen=True)
class ShardInfo:
    """One Arrow IPC file of consecutive rows."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything about a dataset but its pixels.

    Rows are numbered over all shards in order; a class is the range ``[start, start + count)`` of rows.
    With ``rotations`` of length R, every class stands for R classes: the class as it is, and turned
    counter-clockwise by each angle. The id of class c turned by ``rotations[r]`` is ``c * R + r``.

    A dataset of features has float32 [D, 1, 1] in place of every image: what ``network`` makes of it. With ``views``
    the first rows are those of the images as they are, and as many follow for each augmented view of all of them.
    """

    name: str
    shape: tuple[int, int, int]  # C, H, W of every image after decoding
    encoding: str  # "raw": uint8 tensors; "encoded": PNG, JPEG or WebP bytes; "features": float32 tensors
    class_names: list[str]
    class_counts: list[int]
    splits: dict[str, list[int]]  # split name -> indices into class_names
    mean: list[float]  # per channel over the train split, in units of 0..1; of features there is none
    std: list[float]
    shards: list[ShardInfo]
    rotations: list[int] = field(default_factory=lambda: [0])
    source: dict[str, Any] = field(default_factory=dict)  # where it came from; not part of the fingerprint
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> number of files left out
    network: dict[str, Any] | None = None  # of features: what made them of which dataset
    views: int = 0
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        def wrong(what: str) -> PipelineError:
            return PipelineError(f"manifest of dataset {self.name!r}: {what}; ingest the dataset again")

        if self.schema != SCHEMA_VERSION:
            raise wrong(f"schema version {self.schema} is not {SCHEMA_VERSION}, the one this code reads")
        if self.encoding not in ENCODINGS:
            raise wrong(f"encoding {self.encoding!r} is none of {', '.join(ENCODINGS)}")
        if len(self.shape) != 3 or any(not isinstance(n, int) or n < 1 for n in self.shape):
            raise wrong(f"image shape {self.shape} is not three positive numbers (channels, height, width)")
        if len(self.class_names) != len(self.class_counts) or len(set(self.class_names)) != len(self.class_names):
            raise wrong("class names are not unique or do not match the class counts")
        if any(count < 1 for count in self.class_counts):
            raise wrong("a class has no images")
        if (self.encoding == FEATURES) != (self.network is not None) or self.views < 0:
            raise wrong("features, and they alone, have a network and may have views")
        if self.stored_rows != sum(shard.rows for shard in self.shards):
            raise wrong("the classes' rows do not add up to the shards' rows")
        seen: dict[int, str] = {}
        for split, members in self.splits.items():
            for index in members:
                if not 0 <= index < len(self.class_names):
                    raise wrong(f"split {split!r} names class number {index}, of {len(self.class_names)}")
                if index in seen:
                    raise wrong(f"class {self.class_names[index]!r} is in splits {seen[index]!r} and {split!r}")
                seen[index] = split
        if not self.rotations or any(angle % 90 for angle in self.rotations):
            raise wrong(f"rotations {self.rotations} are not multiples of 90 degrees")
        channels = 0 if self.encoding == FEATURES else self.shape[0]
        if len(self.mean) != channels or len(self.std) != channels:
            raise wrong("mean and std do not have one value a channel")
        for shard in self.shards:
            if "/" in shard.file or "\\" in shard.file or shard.file.startswith("."):
                raise wrong(f"shard name {shard.file!r} leads out of the dataset's folder")

    @property
    def rows(self) -> int:
        """Images; not counting views."""
        return sum(self.class_counts)

    @property
    def stored_rows(self) -> int:
        """Images and their views."""
        return self.rows * (1 + self.views)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a row."""
        return np.dtype(np.float32 if self.encoding == FEATURES else np.uint8)

    @property
    def class_starts(self) -> np.ndarray:
        """First row of every class, int64 [classes]."""
        counts = np.asarray(self.class_counts, dtype=np.int64)
        return np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content: equal images, classes and splits give an equal fingerprint on any machine."""
        content = self._content()
        for key in ("source", "skipped"):
            content.pop(key)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({**self._content(), "fingerprint": self.fingerprint}, indent=1, sort_keys=True) + "\n"

    def _content(self) -> dict[str, Any]:
        """What is written; a dataset of images is written as it was before there were features."""
        content = asdict(self)
        return content if self.encoding == FEATURES else {k: v for k, v in content.items() if k not in _OF_FEATURES}

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """Read a manifest; ``where`` is named in the error when the text is not one."""
        try:
            content = json.loads(text)
            fingerprint = content.pop("fingerprint")
            content["shape"] = tuple(content["shape"])
            content["shards"] = [ShardInfo(**shard) for shard in content["shards"]]
            manifest = cls(**content)
        except PipelineError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise PipelineError(f"{where} is not a manifest ({reason}); ingest the dataset again") from error
        if manifest.fingerprint != fingerprint:
            raise PipelineError(f"{where} was altered: its fingerprint does not match; ingest the dataset again")
        return manifest
