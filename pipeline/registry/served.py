"""The registered model as MLflow loads it: this file and the light part of the package travel with the weights."""

import logging
import os
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import INTERNAL_ERROR, INVALID_PARAMETER_VALUE, MlflowException
from mlflow.pyfunc import PythonModel

from pipeline.errors import PipelineError
from pipeline.inference import Answers, Enrolment, FewShotClassifier
from pipeline.inference.folders import read_images
from pipeline.inference.requests import enrolment_named, sent_images
from pipeline.nets.own_code import FOLDER

SUPPORT, LABELS, QUERIES = "support_images", "support_labels", "query_images"
_log = logging.getLogger(__name__)


class Refused(MlflowException):
    """Keeps its message: MLflow's server would put the whole request, with all its pixels, before it."""

    @property
    def message(self) -> str:
        return str(self)

    @message.setter
    def message(self, text: str) -> None:
        pass


class ServedClassifier:
    """A few-shot classifier behind MLflow's ``predict``, and as itself through ``unwrap_python_model()``.

    ``enrol``, ``extend`` and ``classify`` are those of :class:`pipeline.inference.FewShotClassifier`;
    ``load_enrolment(path)`` reads a file that ``enrolment.save(path)`` wrote.
    """

    load_enrolment = staticmethod(Enrolment.load)

    def load_context(self, context: Any) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        _refuse_others_code(Path(context.artifacts["classifier"]).parents[1] / "code")
        self.classifier = FewShotClassifier.load(context.artifacts["classifier"], device)
        self.enrol, self.extend = self.classifier.enrol, self.classifier.extend
        self.classify = self.classifier.classify

    def predict(self, context, model_input, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Answer queries.

        Args:
            model_input: a dictionary, a pandas frame or a list of its rows, of ``support_images``, ``support_labels``
                (S names or whole numbers) and ``query_images`` (N). Images are files (bytes, or text in base64) of any
                size, or whole numbers 0 to 255 of the model's shape [C, H, W]; one array [N, C, H, W] will do too.
                With an enrolment, the support set extends it and may be left out.
            params: ``threshold`` "auto", "none" or a number as text; ``unknown_pass`` the share of strangers that
                "auto" lets pass, as text, or "auto" for the calibration's own; ``enrolment`` the name of a file in the
                folder that the environment variable ``PIPELINE_ENROLMENTS`` names, or ""; ``top_k`` how many classes a
                query are listed; ``invert`` turns dark ink on bright paper to bright ink, in files.

        Returns:
            pandas DataFrame of N rows: ``label``, ``probability``, ``score``, ``known``, and ``top_labels`` and
            ``top_probabilities``, lists of ``top_k``.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE, which a server answers as 400, for whatever is wrong in a request.
        """
        try:
            return self._answer(_columns(model_input), params or {})
        except PipelineError as error:
            raise Refused(str(error), INVALID_PARAMETER_VALUE) from None
        except Exception as error:  # MLflow's server would send the traceback to whoever asked
            _log.exception("a request could not be answered")
            raise Refused("the model failed at this request; the server's log says why", INTERNAL_ERROR) from error

    def _answer(self, columns: Mapping[str, Any], params: Mapping[str, Any]) -> pd.DataFrame:
        options = {"threshold": "auto", "unknown_pass": "auto", "enrolment": "", "top_k": 1, "invert": False, **params}
        if columns.get(QUERIES) is None:
            raise PipelineError(f"the request asks nothing: give {QUERIES}, a list of images")
        shape = self.classifier.shape
        support, queries = (
            sent_images(columns.get(name), name, shape, bool(options["invert"]), self.classifier.max_pixels)
            for name in (SUPPORT, QUERIES)
        )
        labels = [] if columns.get(LABELS) is None else columns[LABELS]
        if options["enrolment"]:
            enrolment = enrolment_named(options["enrolment"])
            if len(support) or _depth(labels) != 1 or len(labels):
                enrolment = self.classifier.extend(enrolment, support, labels)
        else:
            enrolment = self.classifier.enrol(support, labels)
        for name in enrolment.classes:
            if str(name).encode("utf-8", "ignore").decode() != str(name):
                raise PipelineError(f"label {name!a:.80} holds half of a character, which no answer can")
        answers = self.classifier.classify(enrolment, queries, options["threshold"], _share(options["unknown_pass"]))
        return _table(answers, options["top_k"])

    def read_image(self, path: str | os.PathLike[str], invert: bool = False) -> np.ndarray:
        """An image file as the model sees it: uint8 [C, H, W], the central part, turned, cut and resized."""
        pictures = read_images([Path(path)], self.classifier.shape, invert, self.classifier.max_pixels)
        for _, why in pictures.skipped:
            raise PipelineError(f"{path} cannot be read ({why})")
        return pictures.images[0]


def _refuse_others_code(code: Path) -> None:
    """Of modules of one name a process has one: refuse to answer with that of another model, or of the caller.

    Networks given as ``backbone=module`` have names of their own, and stay apart.
    """
    for own in code.iterdir():
        module = sys.modules.get(own.stem)
        if own.name in ("pipeline", FOLDER) or module is None:
            continue
        there = next(iter(getattr(module, "__path__", [])), None) or getattr(module, "__file__", None)
        if there is None or _texts(Path(there)) != _texts(own):
            raise PipelineError(
                f"this model's own code {own.name} is not the {there or 'module'} that this process has imported under "
                "the same name: load the model in a process of its own, or train its network as backbone=module, "
                "whose code is kept apart"
            )


def _texts(origin: Path) -> dict[Path, bytes]:
    """A module's Python files by their path in it."""
    files = origin.rglob("*.py") if origin.is_dir() else [origin]
    return {file.relative_to(origin): file.read_bytes() for file in files}


def _share(given: Any) -> float | None:
    if given == "auto":
        return None
    try:
        return float(given)
    except (TypeError, ValueError):
        raise PipelineError(f"unknown_pass={given!r:.40}: give auto or a share of strangers, as 0.05") from None


def _columns(given: Any) -> dict[str, Any]:
    """The columns of a request, whatever form it has."""
    if isinstance(given, list) and all(isinstance(row, Mapping) for row in given):
        given = pd.DataFrame(given)
    if isinstance(given, pd.DataFrame):
        given = _of_frame(given)
    if not isinstance(given, Mapping):
        raise PipelineError(f"the input is {type(given).__name__}: give the columns {SUPPORT}, {LABELS} and {QUERIES}")
    for name in given:  # others are left alone, as MLflow does, but not one that is misspelt
        meant = get_close_matches(str(name)[:40], (SUPPORT, LABELS, QUERIES), 1, 0.8)
        if meant and name not in (SUPPORT, LABELS, QUERIES):
            raise PipelineError(f"unknown column {str(name)!r:.40}; did you mean {meant[0]!r}?")
    return dict(given)


def _of_frame(frame: pd.DataFrame) -> dict[str, Any]:
    """Columns of a frame, which may be of different lengths: what is missing in a row is left out.

    A frame of one row may hold whole lists, too.
    """
    there = {name: [_depth(cell) > 0 or not pd.isna(cell) for cell in column] for name, column in frame.items()}
    if SUPPORT in there and LABELS in there and there[SUPPORT] != there[LABELS] and len(frame) > 1:
        raise PipelineError(f"{SUPPORT} and {LABELS} are not given in the same rows")
    columns: dict[str, Any] = {}
    for name, column in frame.items():
        cells = [cell for cell, given in zip(column, there[name], strict=True) if given]
        cells = [cell.item() if isinstance(cell, np.ndarray) and cell.ndim == 0 else cell for cell in cells]
        if len(cells) < len(column) and all(isinstance(cell, float) and cell.is_integer() for cell in cells):
            cells = [int(cell) for cell in cells]  # pandas makes fractions of numbers in a column with gaps
        columns[str(name)] = cells[0] if len(cells) == 1 and _depth(cells[0]) in (1, 4) else cells
    return columns


def _depth(cell: Any) -> int:
    """Dimensions of an array or of nested lists: 1 is a list, 3 an image, 4 a list of images."""
    if isinstance(cell, np.ndarray):
        return cell.ndim
    if not isinstance(cell, list | tuple):
        return 0
    return 1 + (_depth(cell[0]) if cell else 0)


def _table(answers: Answers, top_k: int | None) -> pd.DataFrame:
    if top_k is None or not 1 <= top_k <= len(answers.classes):
        raise PipelineError(f"top_k={top_k}: give 1 to {len(answers.classes)}, the number of enrolled classes")
    labels, probabilities = answers.top(top_k)
    return pd.DataFrame(
        {
            "label": answers.labels,
            "probability": answers.probabilities.max(axis=1).astype(float),
            "score": answers.scores.astype(float),
            "known": answers.known,
            "top_labels": labels,
            "top_probabilities": probabilities.astype(float).tolist(),
        }
    )


class _Model(ServedClassifier, PythonModel):
    """Inherits ``predict``: of one's own, MLflow asks for type hints, and has none for a dictionary of arrays."""


mlflow.models.set_model(_Model())
