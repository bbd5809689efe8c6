"""Matching networks (Vinyals, Blundell, Lillicrap, Kavukcuoglu & Wierstra 2016)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.functional.attention import cosine_sums, log_attended, log_sharpened
from pipeline.functional.distances import DISTANCES
from pipeline.functional.losses import PADDING, cross_entropy
from pipeline.functional.prototypes import one_hot
from pipeline.methods.base import State
from pipeline.methods.head import HeadMethod
from pipeline.nets.by_name import choose
from pipeline.nets.full_context import READINGS, QueryContext, SupportContext


class Matching(HeadMethod):
    """The label of a query is an attention-weighted sum of the labels of the support images (equation 1).

    p(c | x) = sum over images i of class c of softmax_i(cos(f(x), g(x_i))). Without full context f and g are the
    backbone. Published on Omniglot 98.1 / 98.9 (5-way) and 93.8 / 98.5 (20-way), and on a mini-ImageNet split of the
    authors' own 44.2 / 57.0, with fine-tuning 46.6 / 60.0; on the usual split Ravi & Larochelle measured 43.40 / 51.09
    with ``prediction=ravi`` and 43.56 / 55.31 with full context.

    Args:
        backbone: f' and g'.
        distance: "cosine" (the paper's; cosines lie in [-1, 1], so that the attention is nearly flat),
            "squared_euclidean" (the re-implementation that found it to learn better), "euclidean" or "dot".
        scale: what the similarity is multiplied by before the softmax; 1 is the paper's. Larger ones sharpen
            the attention, as TADAM's alpha does for prototypes.
        learn_scale: train that factor with the network.
        prediction: "attention"; "ravi": the cosines of a class summed are its logit; "closer": attention
            softmax(100 relu(cos)), and 1e-6 added to probabilities. Both are of official code and need the cosine.
        full_context: embed the support by a bidirectional LSTM and the query by an LSTM that attends to it.
        reading: how the query reads: "concat" (the paper's), "added", "closer" or "ravi": see
            :class:`pipeline.nets.full_context.QueryContext`.
        unrolls: steps K of the reading (2 in the re-implementation, 3 in Ravi & Larochelle's; the paper leaves it
            open); "closer" takes as many as there are support images.
        aligned: false: the backward LSTM's outputs stay reversed, as in Ravi & Larochelle's code.
        shuffle_support: read the support in a random order while training, as a class has no place in it.
        joint_forward: while training, embed support and query in one call, so that batch-norm sees both.
    """

    def __init__(
        self,
        backbone: nn.Module,
        distance: str = "cosine",
        scale: float = 1.0,
        learn_scale: bool = False,
        prediction: str = "attention",
        full_context: bool = False,
        reading: str = "concat",
        unrolls: int = 2,
        aligned: bool = True,
        shuffle_support: bool = True,
        joint_forward: bool = True,
    ) -> None:
        super().__init__(backbone)
        self.distance = DISTANCES[choose("distance", distance, DISTANCES)]
        self.prediction = choose("prediction", prediction, ("attention", "ravi", "closer"))
        if prediction != "attention" and distance != "cosine":
            raise PipelineError(f"prediction={prediction} is made of cosines and cannot have distance={distance}")
        if prediction != "attention" and (scale != 1 or learn_scale):
            raise PipelineError(f"prediction={prediction} has a sharpness of its own and takes no scale")
        self.scale: Tensor | float = nn.Parameter(torch.tensor(float(scale))) if learn_scale else float(scale)
        choose("reading", reading, READINGS)
        self.support_context = SupportContext(self.width, aligned) if full_context else None
        self.query_context = QueryContext(self.width, reading, unrolls) if full_context else None
        self.shuffle_support, self.joint_forward = shuffle_support, joint_forward

    def fit(self, features: Tensor, labels: Tensor, way: int) -> State:
        """The embedded support [T, S, D] and its labels as members [T, S, way]."""
        members = one_hot(labels, way, features.dtype)
        if self.support_context is not None:
            shuffle = self.training and self.shuffle_support
            features = self.support_context(features, members.any(-1), shuffle)
        return {"support": features, "members": members}

    def scores(self, state: State, query: Tensor) -> Tensor:
        """Log-probabilities [T, Q, way]; for ``prediction=ravi`` logits."""
        support, members = state["support"], state["members"]
        if self.query_context is not None:
            query = self.query_context(query, support, members.any(-1))
        if self.prediction == "ravi":
            return cosine_sums(query, support, members)
        if self.prediction == "closer":
            return log_sharpened(query, support, members)
        return log_attended(self.scale * self.distance(query, support), members)

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """-log p(true class)."""
        if self.prediction == "ravi":
            return cross_entropy(logits, labels)
        return F.nll_loss(logits.flatten(0, 1), labels.flatten(), ignore_index=PADDING)
