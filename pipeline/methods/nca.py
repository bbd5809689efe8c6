"""Neighbourhood components analysis (Goldberger, Roweis, Hinton & Salakhutdinov 2004) on a backbone."""

from torch import Tensor, nn

from pipeline.batch import Batch, Episodes
from pipeline.functional.distances import euclidean, squared_euclidean
from pipeline.functional.nca import log_right_neighbour, pair_losses
from pipeline.functional.neighbours import ANSWERS, recall, remember
from pipeline.methods.base import State
from pipeline.methods.head import HeadMethod
from pipeline.nets.by_name import choose

OBJECTIVES = ("expected", "log", "negatives", "pairs")


class NCA(HeadMethod):
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

    def __init__(
        self,
        backbone: nn.Module,
        dim: int | None = None,
        objective: str = "expected",
        squared: bool = True,
        answer: str = "soft",
    ) -> None:
        super().__init__(backbone)
        self.transform = nn.Linear(self.width, self.width if dim is None else dim, bias=False)  # A
        nn.init.orthogonal_(self.transform.weight)
        self.objective_name = choose("objective", objective, OBJECTIVES)
        self.answer = choose("answer", answer, ANSWERS)
        self.extendable = answer == "class_mean"
        self.distance = squared_euclidean if squared else euclidean

    def project(self, features: Tensor) -> Tensor:
        """A x."""
        return self.transform(features)

    def fit(self, features: Tensor, labels: Tensor, way: int) -> State:
        """The embedded support and its members; for class means prototypes [T, way, D] and counts."""
        return remember(features, labels, way, self.answer)

    def scores(self, state: State, query: Tensor) -> Tensor:
        """Logits [T, Q, way] whose softmax is, for "soft", the probability of the class."""
        return recall(state, query, self.distance, self.answer, class_by_class=not self.training)

    def distances(self, logits: Tensor) -> Tensor | None:
        return None if self.answer == "soft" else -logits

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over tasks, and over their images or pairs. Images without another of their class count nowhere."""
        assert isinstance(batch, Episodes)
        features, labels = self.together(batch)
        figures = {"accuracy": self.accuracy_of(batch, features)}
        distances = self.distance(features, features)
        if self.objective_name in ("negatives", "pairs"):
            return pair_losses(distances, labels, with_positive=self.objective_name == "pairs").mean(), figures
        log_right, counted = log_right_neighbour(distances, labels)
        losses = (-log_right if self.objective_name == "log" else 1 - log_right.exp()).where(counted, 0)
        return (losses.sum(1) / counted.sum(1).clamp(min=1)).mean(), figures
