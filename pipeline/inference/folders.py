"""Images from files: of any size and mode, found and brought to the model's shape as an ingest does."""

import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.data.images import MAX_PIXELS
from pipeline.data.sources.base import HARMLESS, Shape
from pipeline.data.sources.files import Rule, Unusable, content_of, decode
from pipeline.data.sources.tree import Entry, by_class, list_folder
from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Pictures:
    """Images that could be read, and the files that could not."""

    images: np.ndarray  # [N, C, H, W] uint8
    files: list[Path]  # [N]
    skipped: list[tuple[Path, str]] = field(default_factory=list)  # file and reason


def read_images(files: Iterable[Path], shape: Shape, invert: bool = False, max_pixels: int = MAX_PIXELS) -> Pictures:
    """Read image files to uint8 [N, C, H, W]. What is no readable image is left out and listed with the reason.

    ``invert`` turns dark ink on bright paper to bright ink, as some datasets (Omniglot) are stored. Images of
    more than ``max_pixels`` are left out.
    """
    rule = Rule(shape, invert=invert, max_pixels=max_pixels)
    images, kept, skipped = [], [], []
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")  # Pillow's, about a file: what cannot be used is listed
        for file in files:
            try:
                images.append(decode(content_of(Entry(file.name, str(file), None), {}, stack), rule)[0])
                kept.append(file)
            except Unusable as problem:
                skipped.append((file, problem.detail or problem.reason))
    return Pictures(np.stack(images) if images else np.empty((0, *shape), dtype=np.uint8), kept, skipped)


def read_support(
    folder: str | Path, shape: Shape, invert: bool = False, max_pixels: int = MAX_PIXELS
) -> tuple[Pictures, list[str]]:
    """Labelled images: one sub-folder a class, named after it. The label of every image comes second.

    Raises:
        PipelineError: no such folder, no sub-folders, or a class of which no image can be read.
    """
    root = Path(folder)
    entries, skipped = _listed(root, f"support={folder}")
    classes = by_class([entry for entry in entries if "/" in entry.name], slice(0, 1))
    if not classes:
        raise PipelineError(f"support={folder}: it has no sub-folders; give one folder a class, with its images in it")
    label_of = {Path(entry.container): name for name, members in classes.items() for entry in members}
    pictures = read_images(label_of, shape, invert, max_pixels)
    labels = [label_of[file] for file in pictures.files]
    for name in classes:
        if name not in labels:
            raise PipelineError(f"support={folder}: no image of class {name!r} can be read; give at least one")
    pictures.skipped.extend(skipped)
    pictures.skipped.extend((Path(e.container), "lies in no class folder") for e in entries if "/" not in e.name)
    return pictures, labels


def read_queries(
    places: str | Path | Sequence[str | Path], shape: Shape, invert: bool = False, max_pixels: int = MAX_PIXELS
) -> Pictures:
    """Images of one or more files and folders (with their sub-folders), sorted within each folder."""
    files: list[Path] = []
    skipped: list[tuple[Path, str]] = []
    for place in [places] if isinstance(places, str | os.PathLike) else places:
        path = Path(place)
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            entries, others = _listed(path, f"queries={place}")
            files += [Path(entry.container) for entry in entries]
            skipped += others
        else:
            what = "it is neither a file nor a folder" if path.exists() else "there is no such file or folder"
            raise PipelineError(f"queries={place}: {what}")
    if not files:
        raise PipelineError(f"queries={places}: there are no files in it")
    pictures = read_images(files, shape, invert, max_pixels)
    pictures.skipped.extend(skipped)
    return pictures


def _listed(root: Path, given: str) -> tuple[list[Entry], list[tuple[Path, str]]]:
    """The files below a folder, folder by folder, and what an ingest would hold against it."""
    entries, skipped = list_folder(str(root), given.partition("=")[0])
    entries.sort(key=lambda entry: entry.name.split("/"))

    held = [skip for skip in skipped if skip.reason not in HARMLESS]
    return entries, [(root / skip.file, skip.detail or skip.reason) for skip in held]
