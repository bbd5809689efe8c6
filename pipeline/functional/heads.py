"""Classifiers of new classes on frozen features: each is fitted to the support sets of all tasks at once.

``fit(features [T, S, D], labels [T, S], way)`` returns a state of tensors that lead with the tasks, and
``scores(state, query [T, Q, D])`` the logits [T, Q, way]. Labels are in any order and number; -1 is padding.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.functional import fine_tuning
from pipeline.functional.distances import cosine, euclidean, squared_euclidean
from pipeline.functional.gram import linear_scores
from pipeline.functional.logistic import multinomial_weights
from pipeline.functional.neighbours import recall, remember
from pipeline.functional.ridge import metaopt_ridge_weights
from pipeline.functional.svm import svm_weights

Fitted = dict[str, Tensor]
DISTANCES = {"squared_euclidean": squared_euclidean, "euclidean": euclidean, "cosine": cosine}


class Head(Protocol):
    def fit(self, features: Tensor, labels: Tensor, way: int) -> Fitted: ...

    def scores(self, state: Fitted, query: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Prototype:
    """Minus the distance to the class's mean."""

    distance: str = "squared_euclidean"
    answer = "class_mean"

    def fit(self, features: Tensor, labels: Tensor, way: int) -> Fitted:
        return remember(features, labels, way, self.answer)

    def scores(self, state: Fitted, query: Tensor) -> Tensor:
        return recall(state, query, DISTANCES[self.distance], self.answer)


@dataclass(frozen=True)
class Nearest(Prototype):
    """Minus the distance to the nearest image of the class, so that the answer is the nearest image's class."""

    distance: str = "cosine"
    answer = "nearest"


@dataclass(frozen=True)
class Votes:
    """Every image of the support votes for its class with its cosine to the query ("NIL", Raghu et al. 2020)."""

    def fit(self, features: Tensor, labels: Tensor, way: int) -> Fitted:
        return remember(features, labels, way, "nearest")

    def scores(self, state: Fitted, query: Tensor) -> Tensor:
        cosines = 1 - cosine(query, state["support"])
        return cosines @ state["members"].to(cosines.dtype)


@dataclass(frozen=True)
class Linear:
    """A linear layer from a fixed start, trained on the support (Chen et al. 2019, "Baseline")."""

    descent: fine_tuning.Descent = fine_tuning.Descent()

    def fit(self, features: Tensor, labels: Tensor, way: int) -> Fitted:
        """weight [T, way, D] and bias [T, way]."""
        weight, bias = (_for_each_task(w, features) for w in fine_tuning.initial_weights(way, features.shape[-1]))
        orders = fine_tuning.epoch_orders(labels, self.descent.epochs)
        weight, bias = fine_tuning.fine_tune_linear(features, labels, weight, bias, orders, self.descent)
        return {"weight": weight, "bias": bias}

    def scores(self, state: Fitted, query: Tensor) -> Tensor:
        return query.to(state["weight"].dtype) @ state["weight"].mT + state["bias"].unsqueeze(-2)


@dataclass(frozen=True)
class Cosine:
    """A layer of cosines, trained likewise ("Baseline++"); ``scale`` None: by the number of classes."""

    descent: fine_tuning.Descent = fine_tuning.Descent()
    scale: float | None = None

    def fit(self, features: Tensor, labels: Tensor, way: int) -> Fitted:
        """direction [T, way, D] and length [T, way, 1]."""
        direction = _for_each_task(fine_tuning.initial_weights(way, features.shape[-1])[0], features)
        orders = fine_tuning.epoch_orders(labels, self.descent.epochs)
        direction, length = fine_tuning.fine_tune_cosine(
            features, labels, direction, direction.norm(dim=-1, keepdim=True), self._scale(way), orders, self.descent
        )
        return {"direction": direction, "length": length}

    def scores(self, state: Fitted, query: Tensor) -> Tensor:
        length = state["length"]
        return fine_tuning.cosine_scores(query, state["direction"], length, self._scale(length.shape[-2]))

    def _scale(self, way: int) -> float:
        return fine_tuning.cosine_scale(way) if self.scale is None else self.scale


@dataclass(frozen=True)
class SVM:
    """MetaOptNet's multi-class support-vector machine, with its authors' constants and without a scale of logits."""

    cost: float = 0.1
    ridge: float = 1.0

    def fit(self, features: Tensor, labels: Tensor, way: int) -> Fitted:
        """weight [T, way, D]."""
        return {"weight": svm_weights(features, labels, way, self.cost, self.ridge)[0]}

    def scores(self, state: Fitted, query: Tensor) -> Tensor:
        return linear_scores(query, state["weight"])


@dataclass(frozen=True)
class Ridge:
    """MetaOptNet's ridge regression onto one-hot labels, likewise."""

    penalty: float = 50.0

    def fit(self, features: Tensor, labels: Tensor, way: int) -> Fitted:
        """weight [T, way, D]."""
        return {"weight": metaopt_ridge_weights(features, labels, way, self.penalty)}

    def scores(self, state: Fitted, query: Tensor) -> Tensor:
        return linear_scores(query, state["weight"])


@dataclass(frozen=True)
class Logistic:
    """Multinomial logistic regression (Tian et al. 2020), ``cost`` the inverse of the penalty on its weights."""

    cost: float = 1.0

    def fit(self, features: Tensor, labels: Tensor, way: int) -> Fitted:
        """weight [T, way, D] and bias [T, way]."""
        weight, bias = multinomial_weights(features, labels, way, self.cost)
        return {"weight": weight, "bias": bias}

    def scores(self, state: Fitted, query: Tensor) -> Tensor:
        return linear_scores(query, state["weight"]) + state["bias"].unsqueeze(-2)


HEADS: dict[str, Any] = {
    "svm": SVM,
    "ridge": Ridge,
    "prototype": Prototype,
    "nearest": Nearest,
    "votes": Votes,
    "linear": Linear,
    "cosine": Cosine,
}


def _for_each_task(weight: Tensor, features: Tensor) -> Tensor:
    """[...] to [T, ...], on the device and in the precision that the head computes with."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    return weight.to(features.device, dtype).expand(len(features), *weight.shape)
