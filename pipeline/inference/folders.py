"""Images from files: of any size and mode, brought to the model's shape as the training images were."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.images import decode
from pipeline.errors import PipelineError

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Pictures:
    """Images that could be read, and the files that could not."""

    images: np.ndarray  # [N, C, H, W] uint8
    files: list[Path]  # [N]
    skipped: list[tuple[Path, str]] = field(default_factory=list)  # file and reason


def read_images(files: Iterable[Path], shape: Shape, invert: bool = False) -> Pictures:
    """Read image files to uint8 [N, C, H, W]. What is no readable image is left out and listed with the reason.

    ``invert`` turns dark ink on bright paper to bright ink, as some datasets (Omniglot) are stored.
    """
    images, kept, skipped = [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for file in files:
            try:
                images.append(decode(file.read_bytes(), shape))
                kept.append(file)
            except Exception as error:  # Pillow's readers fail in as many ways as files can be broken
                skipped.append((file, " ".join(str(error).split()) or type(error).__name__))
    stacked = np.stack(images) if images else np.empty((0, *shape), dtype=np.uint8)
    return Pictures(255 - stacked if invert else stacked, kept, skipped)


def read_support(folder: str | Path, shape: Shape, invert: bool = False) -> tuple[Pictures, list[str]]:
    """Labelled images: one sub-folder a class, named after it. The label of every image comes second.

    Raises:
        PipelineError: no such folder, no sub-folders, or a class of which no image can be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise PipelineError(f"support={folder}: there is no such folder")
    classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise PipelineError(f"support={folder}: it has no sub-folders; give one folder a class, with its images in it")
    pictures = read_images((file for path in classes for file in _files(path)), shape, invert)
    labels = [file.relative_to(root).parts[0] for file in pictures.files]
    for path in classes:
        if path.name not in labels:
            raise PipelineError(f"support={folder}: no image of class {path.name!r} can be read; give at least one")
    return pictures, labels


def read_queries(places: str | Path | Sequence[str | Path], shape: Shape, invert: bool = False) -> Pictures:
    """Images of one or more files and folders (with their sub-folders), sorted within each folder."""
    files: list[Path] = []
    for place in [places] if isinstance(places, str | os.PathLike) else places:
        path = Path(place)
        if not path.exists():
            raise PipelineError(f"queries={place}: there is no such file or folder")
        files += _files(path) if path.is_dir() else [path]
    if not files:
        raise PipelineError(f"queries={places}: there are no files in it")
    return read_images(files, shape, invert)


def _files(folder: Path) -> list[Path]:
    """The files below ``folder``, hidden ones left out."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))
