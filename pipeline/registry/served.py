"""The registered model as MLflow loads it: this file and the light part of the package travel with the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.pyfunc import PythonModel

from pipeline.errors import PipelineError
from pipeline.inference import Answers, Enrolment, FewShotClassifier, Label


class ServedClassifier:
    """A few-shot classifier behind MLflow's ``predict``, and as itself through ``unwrap_python_model()``."""

    classifier: FewShotClassifier

    def load_context(self, context: Any) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.classifier = FewShotClassifier.load(context.artifacts["classifier"], device)

    def predict(self, context, model_input, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Answer queries.

        Args:
            model_input: ``support_images`` uint8 [S, C, H, W], ``support_labels`` int64 [S], ``query_images`` uint8
                [N, C, H, W]. With an enrolment file, S may be 0; otherwise it is extended by the support set.
            params: ``threshold`` "auto", "none" or a number; ``enrolment`` the path of an enrolment file, or "";
                ``top_k`` how many classes a query are listed.

        Returns:
            pandas DataFrame of N rows: ``label``, ``probability``, ``score``, ``known``, and ``top_labels`` and
            ``top_probabilities``, lists of ``top_k``.
        """
        options = {"threshold": "auto", "enrolment": "", "top_k": 1, **(params or {})}
        images = np.asarray(model_input["support_images"])
        labels = np.asarray(model_input["support_labels"])
        if options["enrolment"]:
            enrolment = Enrolment.load(options["enrolment"])
            if len(images):
                enrolment = self.classifier.extend(enrolment, images, labels)
        else:
            enrolment = self.classifier.enrol(images, labels)
        answers = self.classifier.classify(enrolment, np.asarray(model_input["query_images"]), options["threshold"])
        return _table(answers, int(options["top_k"]))

    def enrol(self, images: np.ndarray, labels: Sequence[Label] | np.ndarray, keep_images: bool = True) -> Enrolment:
        """Learn classes: :meth:`pipeline.inference.FewShotClassifier.enrol`."""
        return self.classifier.enrol(images, labels, keep_images)

    def extend(self, enrolment: Enrolment, images: np.ndarray, labels: Sequence[Label] | np.ndarray) -> Enrolment:
        """Add classes or images: :meth:`pipeline.inference.FewShotClassifier.extend`."""
        return self.classifier.extend(enrolment, images, labels)

    def classify(self, enrolment: Enrolment, images: np.ndarray, threshold: float | str | None = "auto") -> Answers:
        """Answer queries: :meth:`pipeline.inference.FewShotClassifier.classify`."""
        return self.classifier.classify(enrolment, images, threshold)

    def load_enrolment(self, path: str) -> Enrolment:
        """Read a file that ``enrolment.save(path)`` wrote."""
        return Enrolment.load(path)


def _table(answers: Answers, top_k: int) -> pd.DataFrame:
    if not 1 <= top_k <= len(answers.classes):
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
