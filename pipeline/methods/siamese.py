"""Siamese networks for one-shot recognition (Koch, Zemel & Salakhutdinov 2015)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.batch import Batch, Episodes
from pipeline.errors import PipelineError
from pipeline.functional.distances import euclidean
from pipeline.functional.neighbours import class_logsumexp, class_max
from pipeline.functional.precision import in_float32
from pipeline.functional.prototypes import one_hot
from pipeline.functional.sequences import reordered
from pipeline.functional.triplets import negatives, positives
from pipeline.methods.base import State
from pipeline.methods.head import HeadMethod
from pipeline.nets.by_name import choose


class Siamese(HeadMethod):
    """Are two images of one class? p(same) = sigmoid(sum_j alpha_j |h_1j - h_2j| + b); a query is of the likeliest.

    Trained on pairs that are drawn from the support and query images of every task; the sum over pairs of the paper is
    a mean, and its missing minus sign is there. The paper's own network is ``backbone=koch`` on 105 x 105 images:
    92.0 on Lake's 20-way one-shot runs with pairs that are transformed affinely; as run by Vinyals et al. 97.3 / 98.4
    (5-way) and 88.1 / 97.0 (20-way).

    Args:
        backbone: h, shared by both sides.
        pairs: drawn from every task, half of them of one class (a batch has 128 in the paper).
        loss: "bce", the paper's cross-entropy; "contrastive" (Hadsell et al. 2006) has no alpha: with the Euclidean
            distance d, p(same) is then taken as sigmoid(margin / 2 - d).
        margin: of the contrastive loss.
        shots: several images of a class count by the "mean" or the "max" of p(same); the paper has one.
        l2: lambda, one for all weights or one a layer, of lambda ||w||^2 added to the loss (the paper's are between 0
            and 0.1). Layers are the backbone's convolutions and matrices in their order, then alpha; biases have none.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pairs: int = 128,
        loss: str = "bce",
        margin: float = 1.0,
        shots: str = "mean",
        l2: float | Sequence[float] = 0.0,
    ) -> None:
        super().__init__(backbone)
        if pairs < 2 or pairs % 2:
            raise PipelineError(f"pairs={pairs} must be an even number: half of the pairs are of one class")
        self.pairs, self.margin = pairs, margin
        self.contrastive = choose("loss", loss, ("bce", "contrastive")) == "contrastive"
        self.shots = choose("shots", shots, ("mean", "max"))
        if not self.contrastive:
            self.alpha = nn.Parameter(torch.randn(self.width) * 0.2)
            self.bias = nn.Parameter(torch.randn(()) * 0.01 + 0.5)
        layers = len(self._layers())
        self.l2 = [float(x) for x in l2] if isinstance(l2, Sequence) else [float(l2)] * layers
        if len(self.l2) != layers or min(self.l2) < 0:
            raise PipelineError(f"l2={l2} must be one number or {layers}, one a layer, none below 0")

    def fit(self, features: Tensor, labels: Tensor, way: int) -> State:
        """The embedded support [T, S, D] and its labels as members [T, S, way]."""
        return {"support": features, "members": one_hot(labels, way)}

    def scores(self, state: State, query: Tensor) -> Tensor:
        """Logits of p(same) [T, Q, way]."""
        if self.contrastive:
            evidence = self.margin / 2 - euclidean(query, state["support"])
        else:
            evidence = every_weighted_l1(query, state["support"], self.alpha, self.bias)
        return class_evidence(evidence, state["members"], self.shots)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the pairs, and the penalty of the weights."""
        assert isinstance(batch, Episodes)
        h, labels = self.together(batch)
        first, second, same = draw_pairs(labels, self.pairs)
        h1, h2 = reordered(h, first), reordered(h, second)
        if self.contrastive:
            distance = euclidean(h1.unsqueeze(-2), h2.unsqueeze(-2)).flatten(1)
            loss, evidence = contrastive(distance, same, self.margin), self.margin / 2 - distance
        else:
            evidence = weighted_l1(h1, h2, self.alpha, self.bias)
            loss = F.binary_cross_entropy_with_logits(evidence, same.to(evidence.dtype))
        right = ((evidence > 0) == same).float().mean()
        return loss + self._penalty(), {"accuracy": self.accuracy_of(batch, h), "pair_accuracy": right}

    def _layers(self) -> list[nn.Parameter]:
        """What the penalty is of: the weights of convolutions and matrices, then alpha."""
        matrices = [p for p in self.backbone.parameters() if p.ndim > 1]
        return matrices if self.contrastive else [*matrices, self.alpha]

    def _penalty(self) -> Tensor | float:
        terms = [rate * w.square().sum() for rate, w in zip(self.l2, self._layers(), strict=True) if rate]
        return torch.stack(terms).sum() if terms else 0.0


@in_float32
def weighted_l1(x: Tensor, y: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    """The logit of p(same) = sigmoid(sum_j alpha_j |x_j - y_j| + b): [..., D] and [..., D] give [...]."""
    return (x - y).abs() @ alpha + bias


@in_float32
def every_weighted_l1(x: Tensor, y: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    """:func:`weighted_l1` of every query with every image: [T, Q, D] and [T, S, D] give [T, Q, S] in that memory.

    alpha_j |x_j - y_j| is a distance of scaled coordinates, added where alpha is positive and taken off where not.
    """
    towards, away = alpha.relu(), (-alpha).relu()
    return torch.cdist(x * towards, y * towards, p=1.0) - torch.cdist(x * away, y * away, p=1.0) + bias


@in_float32
def contrastive(distance: Tensor, same: Tensor, margin: float) -> Tensor:
    """Mean of d^2 / 2 over same pairs and max(0, margin - d)^2 / 2 over the others (Hadsell, Chopra & LeCun 2006).

    Args:
        distance: [...], Euclidean.
        same: bool [...], whether the two images are of one class.
    """
    return 0.5 * distance.square().where(same, F.relu(margin - distance).square()).mean()


@in_float32
def class_evidence(logits: Tensor, members: Tensor, shots: str) -> Tensor:
    """From p(same as image) to p(same as class), as logits: [T, Q, S] and members [T, S, way] give [T, Q, way].

    ``shots``: "mean" or "max" of the probabilities of the class's images. The logit of a mean is taken from the
    logarithms of p and 1 - p, so that classes keep their order where p rounds to 1.
    """
    if shots == "max":
        return class_max(logits, members)
    same = class_logsumexp(F.logsigmoid(logits), members)
    return same - class_logsumexp(F.logsigmoid(-logits), members)


def draw_pairs(labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of images of every task, half of them of one class, uniformly among all such pairs, with replacement.

    Args:
        labels: int64 [T, N] with at least two images of a class and at least two classes; padding is never drawn.
        count: P, even.

    Returns:
        positions in N of the first and of the second images, int64 [T, P], and whether they are of one class, bool
        [T, P].
    """
    n, alike = labels.shape[-1], positives(labels)
    kinds = (alike.tril(-1), negatives(labels).tril(-1))
    chosen = torch.cat([kind.flatten(1).float().multinomial(count // 2, True) for kind in kinds], dim=1)
    return chosen // n, chosen % n, alike.flatten(1).gather(1, chosen)
