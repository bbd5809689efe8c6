"""A few-shot classifier with scikit-learn's manners: ``fit``, ``predict``, ``predict_proba``, ``classes_``."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.images import MAX_PIXELS, decode, standing, to_array
from pipeline.data.sources.base import Shape
from pipeline.errors import PipelineError
from pipeline.inference.answers import Answers
from pipeline.inference.classifier import FewShotClassifier
from pipeline.inference.enrolment import Enrolment, label_kind


class Classifier:
    """A trained few-shot model: ``fit`` shows it a few images of each new class, ``predict`` names others.

    Fitting trains nothing where the method learns a class from its mean: it takes milliseconds.

    Wherever ``images`` are asked for, give one of

    - an array uint8 [N, C, H, W] or [N, H, W, C], or [N, H, W] in grey;
    - a list whose elements are paths of image files, ``PIL.Image`` or arrays uint8 [H, W] or [H, W, C].

    Images of another size than the model's are cut to their central part and resized, as ``jobs.classify`` does.

    Attributes:
        classes_: [way] the labels given to ``fit``, sorted, in the order of the columns of ``predict_proba``.
        enrolment_: what was learnt, for ``enrolment_.save(FILE)``; ``jobs.classify enrolment=FILE`` reads it.
        model: the :class:`~pipeline.inference.FewShotClassifier` behind it.
    """

    def __init__(self, model: FewShotClassifier) -> None:
        self.model = model
        self._labels: list[Any] = []  # [way] the label of every enrolled class, in the enrolment's order
        self._columns = np.empty(0, dtype=np.int64)  # [way] enrolled class of every column

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.model.shape))
        fitted = f"{len(self._labels)} classes" if self._labels else "not fitted"
        return f"Classifier({self.model.spec['method']['name']}, images {shape}, {fitted})"

    def fit(self, images: Any, labels: Iterable[Hashable]) -> Classifier:
        """Learn classes from a few labelled images of each, and forget those learnt before.

        Args:
            images: N images, see the class.
            labels: [N] names, numbers or any other hashable values, none of them missing (NaN).

        Returns:
            The classifier itself.

        Raises:
            PipelineError: images of which one cannot be read, or not one label per image, or a label that is missing.
        """
        return self._learn(None, images, labels)

    def partial_fit(self, images: Any, labels: Iterable[Hashable]) -> Classifier:
        """Learn more classes, or more images of those that are known, and forget nothing.

        Arguments, result and errors are those of :meth:`fit`.
        """
        return self._learn(getattr(self, "enrolment_", None), images, labels)

    def predict(self, images: Any) -> np.ndarray:
        """The most probable class of every image: [N] labels, as they were given to ``fit``; names as Unicode's NFC.

        Raises:
            PipelineError: not fitted yet, or an image that cannot be read.
        """
        probabilities = self.predict_proba(images)
        return self.classes_[probabilities.argmax(axis=1)]

    def predict_proba(self, images: Any) -> np.ndarray:
        """The probability of every class: float32 [N, way] in the order of ``classes_``; rows sum to one.

        Raises:
            PipelineError: not fitted yet, or an image that cannot be read.
        """
        return self._ask(images).probabilities[:, self._columns]

    def known(self, images: Any, threshold: float | str = "auto", unknown_pass: float | None = None) -> np.ndarray:
        """Whether every image belongs to one of the classes at all: bool [N]; False is a stranger.

        Args:
            images: N images, see the class.
            threshold: least score of a known image: "auto", the calibrated one (all are known where the model was not
                calibrated), "none" or a number.
            unknown_pass: share of strangers that "auto" is to let pass: 0.2 knows more of what is enrolled than 0.05.
        """
        return self._ask(images, threshold, unknown_pass).known

    def score(self, images: Any, labels: Iterable[Hashable]) -> float:
        """The fraction of images that ``predict`` names as ``labels`` do."""
        given, found = _labels(labels), self.predict(images)
        if len(given) != len(found) or not given:
            raise PipelineError(f"{len(found)} images came with {len(given)} labels: give one label an image")
        return float(np.mean([a == b for a, b in zip(found, given, strict=True)]))

    def _ask(self, images: Any, threshold: float | str = "none", unknown_pass: float | None = None) -> Answers:
        if not self._labels:
            raise PipelineError("the classifier knows no classes yet: call fit(images, labels) first")
        return self.model.classify(self.enrolment_, self._read(images), threshold, unknown_pass)

    def _read(self, images: Any) -> np.ndarray:
        return read(images, self.model.shape, self.model.max_pixels)

    def _learn(self, before: Enrolment | None, images: Any, labels: Iterable[Hashable]) -> Classifier:
        given = _labels(labels)
        known = [] if before is None else self._labels
        try:
            index = {label: position for position, label in enumerate(dict.fromkeys([*known, *given]))}
        except TypeError as error:
            raise PipelineError(f"labels must be names, numbers or other hashable values ({error})") from error
        order = list(index)
        # Names and whole numbers are enrolled as they are, so that a saved enrolment tells them; others by position.
        plain = label_kind(order) is not None
        if before is not None and plain != (label_kind(known) is not None):
            raise PipelineError("labels are of another type than before: give one kind")
        names: Any = [order[index[label]] if plain else index[label] for label in given]
        pixels = self._read(images)
        learn: Any = self.model.enrol if before is None else partial(self.model.extend, before)
        self.enrolment_ = learn(pixels, names)
        self._labels = order
        self._columns = np.asarray(_sorted(order), dtype=np.int64)
        self.classes_ = _array([order[position] for position in self._columns])
        return self


def read(images: Any, shape: Shape, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Images of any kind that :class:`Classifier` takes, as uint8 [N, C, H, W] of ``shape``.

    Raises:
        PipelineError: names the image that cannot be read, by its path or its position.
    """
    if isinstance(images, str | bytes | os.PathLike | Image.Image) or not isinstance(images, Iterable):
        raise PipelineError("give a list of images, also for a single one: [image]")
    if isinstance(images, np.ndarray) and images.ndim == 4 and images.shape[1:] == shape and images.dtype == np.uint8:
        return images
    if isinstance(images, np.ndarray) and images.ndim == 4 and images.shape[3] not in (1, 3, 4):
        images = images.transpose(0, 2, 3, 1)  # channels first, of another size
    pictures = [_one(image, number, shape, max_pixels) for number, image in enumerate(images)]
    return np.stack(pictures) if pictures else np.empty((0, *shape), dtype=np.uint8)


def _labels(given: Any) -> list[Any]:
    """Labels as Python has them.

    Raises:
        PipelineError: they are no list of one value an image, or one is missing: every NaN would be a class of its own.
    """
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise PipelineError(f"labels are {given!r:.40}: give a list, one label an image")
    try:
        labels = [_label(label) for label in given]
    except (TypeError, ValueError, RuntimeError) as error:  # NumPy's or PyTorch's
        raise PipelineError(f"labels are rows of several values ({error}): give one label an image") from error
    for number, label in enumerate(labels):
        if _missing(label):
            raise PipelineError(f"the label of image {number} is missing ({label}): leave it out, or give it one")
    return labels


def _missing(label: Any) -> bool:
    """Whether it is NaN, "not a time" or pandas' NA, none of which is equal to itself."""
    try:
        return bool(label != label)
    except TypeError:  # of pandas' NA, which says neither yes nor no
        return True


def _label(given: Any) -> Any:
    """A label as Python has it; a name in the one Unicode form that enrolments keep, unlike a Mac's folders."""
    timed = isinstance(given, np.datetime64 | np.timedelta64)  # of nanoseconds Python has but a whole number
    plain = given.item() if hasattr(given, "item") and not timed else given
    return unicodedata.normalize("NFC", plain) if type(plain) is str else plain


def _one(image: Any, number: int, shape: Shape, max_pixels: int) -> np.ndarray:
    try:
        if isinstance(image, str | os.PathLike):
            return decode(Path(image).read_bytes(), shape, max_pixels)
        if isinstance(image, Image.Image) and image.width and image.height:
            return to_array(standing(image), shape)
    except Exception as error:  # Pillow's readers fail in as many ways as files can be broken
        name = f"image {number}" if isinstance(image, Image.Image) else f"image {os.fspath(image)}"
        why = " ".join(str(error).split()) or type(error).__name__
        raise PipelineError(f"{name} cannot be read ({why})") from error
    pixels = np.asarray(image)
    form = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))
    if pixels.dtype != np.uint8 or not pixels.size or not form:
        raise PipelineError(
            f"image {number} is {pixels.dtype} {list(pixels.shape)}: give uint8 [H, W] or [H, W, C], values 0 to 255"
        )
    picture = Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    return to_array(standing(picture), shape)


def _sorted(labels: Sequence[Any]) -> list[int]:
    """Positions of ``labels`` in ascending order; as they came where they cannot be compared."""
    try:
        return sorted(range(len(labels)), key=lambda index: labels[index])
    except TypeError:
        return list(range(len(labels)))


def _array(labels: list[Any]) -> np.ndarray:
    """[way] numbers or names as numpy has them, anything else as objects."""
    kinds = {type(label) for label in labels}
    if len(kinds) == 1 and kinds <= {str, int, float, bool, np.datetime64, np.timedelta64}:
        return np.asarray(labels)
    boxed = np.empty(len(labels), dtype=object)
    for position, label in enumerate(labels):
        boxed[position] = label
    return boxed
