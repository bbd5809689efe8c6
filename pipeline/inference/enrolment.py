"""What a model learnt about the classes that it was shown, as a value that can be kept in a file."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.files import tensors_to_bytes, write_atomic
from pipeline.inference.files import read_tensors, tensors_of
from pipeline.methods.base import State

SCHEMA_VERSION = 1
Label = int | str
_REMEDY = "enrol the classes again"


@dataclass(frozen=True)
class Enrolment:
    """Enrolled classes: the method's state and, unless they were not to be kept, the images it came from."""

    classes: list[Label]
    counts: list[int]  # [way] images of every class
    state: State  # every tensor leads with the task dimension [1, ...]
    model: str  # fingerprint of the model that made it: no other model can read the state
    images: np.ndarray | None  # [S, C, H, W] uint8, or None when only the state is kept
    positions: np.ndarray | None  # [S] int64, the class of every image as a position in ``classes``
    note: str = ""  # how the last change was made

    @property
    def way(self) -> int:
        return len(self.classes)

    @property
    def shot(self) -> float:
        """Images a class, on average."""
        return sum(self.counts) / len(self.counts)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        write_atomic(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """What :meth:`save` writes, for places that are no local file."""
        tensors: dict[str, Tensor] = {f"state.{name}": tensor for name, tensor in self.state.items()}
        if self.images is not None and self.positions is not None:
            tensors["support.images"] = torch.from_numpy(self.images)
            tensors["support.positions"] = torch.from_numpy(self.positions)
        content = {
            "schema": SCHEMA_VERSION,
            "classes": self.classes,
            "counts": self.counts,
            "model": self.model,
            "note": self.note,
        }
        return tensors_to_bytes(tensors, {"enrolment": json.dumps(content)})

    @classmethod
    def load(cls, path: str | Path) -> Enrolment:
        """Read a file that :meth:`save` wrote. Which model it belongs to is checked when it is used."""
        return cls._of(*read_tensors(path, _REMEDY), path)

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> Enrolment:
        """The enrolment of :meth:`to_bytes`; ``name``: where it was read, for messages."""
        return cls._of(*tensors_of(content, name, _REMEDY), name)

    @classmethod
    def _of(cls, tensors: dict[str, Tensor], metadata: dict[str, str], path: str | Path) -> Enrolment:
        try:
            content = json.loads(metadata["enrolment"])
            if content["schema"] != SCHEMA_VERSION:
                raise ValueError(f"schema {content['schema']} is not {SCHEMA_VERSION}")
            state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
            images, positions = tensors.get("support.images"), tensors.get("support.positions")
            enrolment = cls(
                classes=content["classes"],
                counts=content["counts"],
                state=state,
                model=content["model"],
                images=None if images is None else images.numpy(),
                positions=None if positions is None else positions.numpy(),
                note=content["note"],
            )
            enrolment._check()
            return enrolment
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise PipelineError(f"{path} is not an enrolment ({type(error).__name__}: {error}); {_REMEDY}") from error

    def _check(self) -> None:
        if not self.classes or len(set(self.classes)) != len(self.classes) or label_kind(self.classes) is None:
            raise ValueError("its class names are not unique names or numbers")
        if len(self.counts) != len(self.classes) or not all(isinstance(n, int) and n > 0 for n in self.counts):
            raise ValueError("its counts are not one positive number a class")
        if not self.state or any(tensor.ndim < 1 or tensor.shape[0] != 1 for tensor in self.state.values()):
            raise ValueError("its state is not that of one task")
        if (self.images is None) != (self.positions is None):
            raise ValueError("it has images without classes, or classes without images")
        if self.images is not None and self.positions is not None:
            if self.images.dtype != np.uint8 or self.images.ndim != 4:
                raise ValueError("its images are not uint8 [S, C, H, W]")
            if self.positions.dtype != np.int64 or self.positions.shape != self.images.shape[:1]:
                raise ValueError("its images do not have one class each")
            if self.positions.min() < 0 or np.bincount(self.positions, minlength=self.way).tolist() != self.counts:
                raise ValueError("its images do not add up to its counts")


def label_kind(labels: Sequence[object]) -> type | None:
    """``int`` or ``str`` when all labels are of that type, None otherwise."""
    for kind in (int, str):
        if all(type(label) is kind for label in labels):
            return kind
    return None


def plain_labels(labels: Sequence[Label] | np.ndarray, images: int) -> list[Label]:
    """Labels as plain ints or strings, one an image; refused in one line when they are anything else.

    Names come in one Unicode form: "café" is one class, on whatever system it was typed.
    """
    if isinstance(labels, str | bytes) or (isinstance(labels, np.ndarray) and labels.ndim != 1):
        raise PipelineError("labels are no list: give one label an image")
    if not isinstance(labels, Iterable):
        raise PipelineError(f"labels are {labels!r:.40}: give a list, one label an image")
    plain = [label.item() if isinstance(label, np.generic) else label for label in labels]
    plain = [unicodedata.normalize("NFC", label) if isinstance(label, str) else label for label in plain]
    if len(plain) != images:
        raise PipelineError(f"{images} support images came with {len(plain)} labels: give one label an image")
    if label_kind(plain) is None:
        kinds = ", ".join(sorted({type(label).__name__ for label in plain}))
        raise PipelineError(f"labels are of type {kinds}: give whole numbers or names, and not both")
    return plain
