"""What a classifier says about queries."""

from dataclasses import dataclass

import numpy as np

from pipeline.inference.enrolment import Label


@dataclass(frozen=True)
class Answers:
    """Answers to N queries against ``way`` enrolled classes."""

    labels: list[Label]  # [N] the most probable enrolled class of every query, also of those that are not known
    probabilities: np.ndarray  # [N, way] float32, softmax over the enrolled classes, in the order of ``classes``
    scores: np.ndarray  # [N] float32, how much the query is one of an enrolled class, by ``score``
    known: np.ndarray  # [N] bool: score >= threshold; all true without a threshold
    classes: list[Label]  # [way]
    threshold: float | None
    score: str = "logit"  # what ``scores`` are, see pipeline.inference.scores

    def __len__(self) -> int:
        return len(self.labels)

    def top(self, k: int) -> tuple[list[list[Label]], np.ndarray]:
        """The ``k`` most probable classes of every query and their probabilities [N, min(k, way)], best first."""
        order = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :k]
        labels = [[self.classes[index] for index in row] for row in order]
        return labels, np.take_along_axis(self.probabilities, order, axis=1)
