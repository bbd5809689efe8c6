"""What is sent to a served model: images as files or as pixels, labels, the name of an enrolment."""

import base64
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.images import MAX_PIXELS
from pipeline.data.sources.base import Shape
from pipeline.data.sources.files import Rule, Unusable, decode
from pipeline.errors import PipelineError
from pipeline.inference.enrolment import Enrolment

ENROLMENTS = "PIPELINE_ENROLMENTS"  # environment variable: the folder whose enrolments a served model reads


def sent_images(
    given: Any, column: str, shape: Shape, invert: bool = False, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Images of a request as uint8 [N, C, H, W] of ``shape``.

    Args:
        given: a list of image files (bytes, or text in base64, of any size: cut and resized as an ingest does) and of
            arrays of whole numbers 0 to 255 of ``shape``, or one array [N, C, H, W]. None is no image.
        column: what a message calls it.
        invert: turn dark ink on bright paper to bright ink, in files.
        max_pixels: of a file; larger ones are refused.

    Raises:
        PipelineError: names the image that is neither.
    """
    if given is None:
        return np.empty((0, *shape), dtype=np.uint8)
    if isinstance(given, np.ndarray) and given.ndim > 0 and given.dtype.kind not in "OUS":
        return _pixels(given, column, shape)
    if isinstance(given, np.ndarray):
        given = given.tolist()
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise PipelineError(f"{column} is {type(given).__name__}: give a list of images, also for a single one")
    images = list(given)
    if not any(isinstance(image, str | bytes) for image in images):
        return _pixels(images, column, shape)
    rule = Rule(shape, invert=invert, max_pixels=max_pixels)
    return np.stack([_image(image, f"{column}[{number}]", rule) for number, image in enumerate(images)])


def enrolment_named(name: Any) -> Enrolment:
    """A file of the one folder that a server's operator opened by ``PIPELINE_ENROLMENTS``.

    Who sends a name is not to learn what else the server has: a name is no path, and leads to regular files alone.
    """
    folder = os.environ.get(ENROLMENTS)
    if not folder:
        raise PipelineError(f"enrolment={name!r:.80}: enrolments are read where {ENROLMENTS} names their folder, only")
    if not isinstance(name, str) or not re.fullmatch(r"[\w -][\w .-]*", name):
        raise PipelineError(f"enrolment={name!r:.80}: give the name of a file in the server's folder, and no path")
    try:
        path = (Path(folder) / name).resolve(strict=True)
        if path.is_relative_to(Path(folder).resolve()) and path.is_file():
            return Enrolment.load(path)
    except (PipelineError, OSError, RuntimeError):  # whose messages tell the path
        pass
    raise PipelineError(f"enrolment={name!r:.80}: the server has no enrolment of this name")


def _image(image: Any, where: str, rule: Rule) -> np.ndarray:
    """uint8 [C, H, W] of one file or one array."""
    if not isinstance(image, str | bytes):
        return _pixels([image], where, rule.shape)[0]
    content = image if isinstance(image, bytes) else _from_base64(image, where)
    try:
        return decode(content, rule)[0]
    except Unusable as problem:
        raise PipelineError(f"{where} cannot be read ({problem.detail or problem.reason})") from problem


def _from_base64(text: str, where: str) -> bytes:
    """Also of a data URL, as browsers make them, and broken into lines, as shells do."""
    try:
        return base64.b64decode("".join(re.sub(r"^data:[^,]*,", "", text).split()), validate=True)
    except ValueError as error:
        raise PipelineError(f"{where} is text, but no image file in base64") from error


def _pixels(given: Any, column: str, shape: Shape) -> np.ndarray:
    try:
        pixels = np.asarray(given)
    except ValueError as error:
        raise PipelineError(f"{column} holds arrays of different sizes: {_wanted(shape)}") from error
    if pixels.size == 0 and len(pixels) == 0:
        return np.empty((0, *shape), dtype=np.uint8)
    if pixels.dtype.kind not in "ui" or pixels.shape[1:] != shape:
        raise PipelineError(f"{column} is {pixels.dtype} {list(pixels.shape)}: {_wanted(shape)}")
    if pixels.min() < 0 or pixels.max() > 255:
        raise PipelineError(f"{column} holds values from {pixels.min()} to {pixels.max()}: {_wanted(shape)}")
    return pixels.astype(np.uint8, copy=False)


def _wanted(shape: Shape) -> str:
    return f"give image files in base64, or whole numbers 0 to 255 of shape [N, {', '.join(map(str, shape))}]"
