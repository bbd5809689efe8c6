"""Triplet loss with semi-hard mining (FaceNet: Schroff, Kalenichenko & Philbin 2015)."""

from torch import Tensor, nn

from pipeline.batch import Batch, Episodes
from pipeline.functional.distances import euclidean, squared_euclidean, unit
from pipeline.functional.neighbours import recall, remember
from pipeline.functional.triplets import MININGS, REDUCTIONS, mine, reduce
from pipeline.methods.base import State
from pipeline.methods.head import HeadMethod
from pipeline.nets.by_name import choose


class Triplet(HeadMethod):
    """An image is nearer to images of its class than to others by a margin: max(0, d_ap - d_an + alpha) (equation 1).

    The triplets are mined among the support and query images of a task together: a task of P ways with K images a class
    is the P x K batch of metric learning. There are no published figures on few-shot tasks.

    Args:
        mining: "semi_hard", "facenet", "sandberg", "batch_all" or "batch_hard":
            see :func:`pipeline.functional.triplets.mine`.
        margin: alpha.
        squared: squared Euclidean distances as in the paper; false: not squared (tensorflow-addons, margin 1).
        reduction: "mean" over the triplets of a task, "sum" (equation 3), or "mean_nonzero" over those above 0.
        normalise: embeddings have unit length.
        embedding_dim: width of a linear layer after the backbone (128 in the paper); None: the features themselves.
        answer: a query is of the class with the nearest mean embedding, "class_mean", or of the "nearest" image's.
    """

    def __init__(
        self,
        backbone: nn.Module,
        mining: str = "semi_hard",
        margin: float = 0.2,
        squared: bool = True,
        reduction: str = "mean",
        normalise: bool = True,
        embedding_dim: int | None = None,
        answer: str = "class_mean",
    ) -> None:
        super().__init__(backbone)
        self.mining, self.margin = choose("mining", mining, MININGS), margin
        self.reduction = choose("reduction", reduction, REDUCTIONS)
        self.answer = choose("answer", answer, ("class_mean", "nearest"))
        self.extendable = answer == "class_mean"
        self.distance = squared_euclidean if squared else euclidean
        self.normalise = normalise
        self.embedding = nn.Identity() if embedding_dim is None else nn.Linear(self.width, embedding_dim)

    def project(self, features: Tensor) -> Tensor:
        found = self.embedding(features)
        return unit(found) if self.normalise else found

    def fit(self, features: Tensor, labels: Tensor, way: int) -> State:
        """For class means: prototypes [T, way, D] and counts; otherwise the embedded support and its members."""
        return remember(features, labels, way, self.answer)

    def scores(self, state: State, query: Tensor) -> Tensor:
        """Minus the distance to the class's mean or nearest image."""
        return recall(state, query, self.distance, self.answer, class_by_class=not self.training)

    def distances(self, logits: Tensor) -> Tensor:
        return -logits

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over tasks of their triplets' loss; ``active`` is the share of triplets that still have one."""
        assert isinstance(batch, Episodes)
        features, labels = self.together(batch)
        mined = mine(self.distance(features, features), labels, self.mining, self.margin)
        active = mined.active.sum() / mined.triplets.sum().clamp(min=1)
        return reduce(mined, self.reduction).mean(), {"accuracy": self.accuracy_of(batch, features), "active": active}
