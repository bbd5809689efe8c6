"""Neighbourhood components analysis (Goldberger, Roweis, Hinton & Salakhutdinov 2004) on a backbone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Episodes
from pipeline.errors import PipelineError
from pipeline.functional.distances import euclidean, squared_euclidean
from pipeline.functional.losses import accuracy
from pipeline.functional.nca import log_right_neighbour, pair_losses
from pipeline.functional.neighbours import ANSWERS, recall, remember
from pipeline.methods.base import Method, State, embed
from pipeline.nets.by_name import choose

OBJECTIVES = ("expected", "log", "negatives", "pairs")


class NCA(Method):
    """An image picks a neighbour with p_ij = softmax_{j != i}(-||A x_i - A x_j||^2), which shall be of its own class.

    The neighbours are the support and query images of a task together. The paper learns A alone, on given vectors;
    here the backbone under it learns with it. There are no published figures on few-shot tasks.

    Args:
        backbone: x.
        dim: rows of A, which starts as an orthogonal projection; None: as many as there are features.
        objective: "expected": the expected share of wrong neighbours, 1 - mean p_i (the paper's, equation 3); "log":
            mean of -log p_i (its section 2); "negatives": mean over pairs (x, y) of a class of d(x, y) + log sum of
            exp(-d(x, z)) over the images z of other classes, as Proxy-NCA writes NCA: the positive is not in the
            denominator; "pairs": the same with the pair itself in it.
        squared: squared distances; false: not squared.
        answer: "soft": probability of picking a neighbour of the class among the support, as in training; "nearest":
            of the nearest image's class (the paper's test); "class_mean": of the class with the nearest mean.
    """

    embeds_once = True

    def __init__(
        self,
        backbone: nn.Module,
        dim: int | None = None,
        objective: str = "expected",
        squared: bool = True,
        answer: str = "soft",
    ) -> None:
        super().__init__(backbone)
        features = int(backbone.out_features)  # type: ignore[arg-type]
        self.transform = nn.Linear(features, features if dim is None else dim, bias=False)  # A
        nn.init.orthogonal_(self.transform.weight)
        self.objective = choose("objective", objective, OBJECTIVES)
        self.answer = choose("answer", answer, ANSWERS)
        self.distance = squared_euclidean if squared else euclidean

    def adapt(self, support: Tensor, labels: Tensor, way: int | None = None) -> State:
        """The embedded support and its members; for class means prototypes [T, way, D] and counts."""
        way = self.check_support(labels, way)
        return remember(self._embed(support), labels, way, self.answer)

    def classify(self, state: State, query: Tensor) -> Tensor:
        """Logits [T, Q, way] whose softmax is, for "soft", the probability of the class."""
        return recall(state, self._embed(query), self.distance, self.answer, class_by_class=not self.training)

    def extend(self, state: State, support: Tensor, labels: Tensor) -> State | None:
        """More class means; the other answers are found anew."""
        if self.answer != "class_mean":
            return None
        known = state["prototypes"].shape[1]
        if int(labels.min()) < known:
            raise PipelineError(f"new classes are numbered from {known}, the number of classes already known")
        new = self.adapt(support, labels - known)
        return {key: torch.cat([state[key], new[key]], dim=1) for key in state}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over tasks, and over their images or pairs. Images without another of their class count nowhere."""
        assert isinstance(batch, Episodes)
        embeddings = self._embed(torch.cat([batch.support, batch.query], dim=1))
        labels = torch.cat([batch.support_labels, batch.query_labels], dim=1)
        with torch.no_grad():
            support, query = embeddings.split([batch.support.shape[1], batch.query.shape[1]], dim=1)
            state = remember(support, batch.support_labels, batch.way, self.answer)
            logits = recall(state, query, self.distance, self.answer, class_by_class=False)
            found = {"accuracy": accuracy(logits, batch.query_labels)}
        distances = self.distance(embeddings, embeddings)
        if self.objective in ("negatives", "pairs"):
            return pair_losses(distances, labels, with_positive=self.objective == "pairs").mean(), found
        log_right, counted = log_right_neighbour(distances, labels)
        losses = (-log_right if self.objective == "log" else 1 - log_right.exp()).where(counted, 0)
        return (losses.sum(1) / counted.sum(1).clamp(min=1)).mean(), found

    def _embed(self, images: Tensor) -> Tensor:
        """[T, N, C, H, W] -> [T, N, dim]: A x."""
        return self.transform(embed(self.backbone, images))
