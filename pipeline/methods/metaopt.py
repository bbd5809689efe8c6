"""MetaOptNet: meta-learning with differentiable convex optimisation (Lee, Maji, Ravichandran & Soatto 2019)."""

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Episodes
from pipeline.errors import PipelineError
from pipeline.functional.distances import squared_euclidean
from pipeline.functional.gram import linear_scores
from pipeline.functional.losses import accuracy, smoothed_cross_entropy
from pipeline.functional.prototypes import prototypes
from pipeline.functional.ridge import metaopt_ridge_weights
from pipeline.functional.svm import svm_weights, svm_weights_inexact
from pipeline.methods.base import State
from pipeline.methods.head import HeadMethod
from pipeline.nets.by_name import choose


class MetaOpt(HeadMethod):
    """A class is the weight vector of a linear classifier, the exact optimum of a convex problem on the support set.

    Logits are gamma w_k.f(x), without a bias. Support and query are embedded apart, so that batch-norm sees them apart.

    Args:
        backbone: the features; the paper's ResNet-12 ends without average pooling.
        head: "svm": the multi-class SVM of Crammer & Singer (published 62.64 / 78.63 on mini-ImageNet). "ridge":
            regression (61.41 / 77.88). "prototypes": the authors' prototypical head to compare with, whose logits are
            -gamma times the squared distance per feature (59.25 / 75.60).
        cost: C of the SVM.
        kernel_ridge: what the authors' code adds to the diagonal of the SVM's Hessian. The published figures have 1,
            the paper's text 0.
        penalty: lambda of the ridge regression.
        factor: of the ridge's coefficients; the code's 2 comes from how it writes the problem. 1: its R2-D2 head.
        scale, learn_scale: start of gamma, and whether it is trained.
        label_smoothing: share of a training label that is spread over the wrong classes: .1 for the published figures
            on mini-ImageNet, 0 on other data.
        iterations_eval: null: evaluate at the SVM's optimum. 3: after as few iterations of an interior-point method as
            the authors' code has at test, which is far from it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: str = "svm",
        cost: float = 0.1,
        kernel_ridge: float = 1.0,
        penalty: float = 50.0,
        factor: float = 2.0,
        scale: float = 1.0,
        learn_scale: bool = True,
        label_smoothing: float = 0.1,
        iterations_eval: int | None = None,
    ) -> None:
        super().__init__(backbone)
        self.head = choose("head", head, ("svm", "ridge", "prototypes"))
        if cost <= 0 or penalty <= 0 or kernel_ridge < 0:
            raise PipelineError(
                f"cost={cost} and penalty={penalty} must be above zero, and kernel_ridge={kernel_ridge} not below"
            )
        if not 0 <= label_smoothing <= 0.5:
            raise PipelineError(f"label_smoothing={label_smoothing} must be between 0 and .5")
        if iterations_eval is not None and iterations_eval < 1:
            raise PipelineError(f"iterations_eval={iterations_eval} must be at least 1, or null")
        self.cost, self.kernel_ridge, self.penalty, self.factor = cost, kernel_ridge, penalty, factor
        self.label_smoothing, self.iterations_eval = label_smoothing, iterations_eval
        self.scale = nn.Parameter(torch.tensor(float(scale)), requires_grad=learn_scale)

    def fit(self, features: Tensor, labels: Tensor, way: int) -> State:
        """weights [T, way, D], and violation [T]: how far they are from the optimum (0 for heads in closed form)."""
        exact = features.new_zeros(len(labels))
        if self.head == "prototypes":
            return {"weights": prototypes(features, labels, way)[0], "violation": exact}
        if self.head == "ridge":
            weights = metaopt_ridge_weights(features, labels, way, self.penalty, self.factor)
            return {"weights": weights, "violation": exact}
        given = features, labels, way, self.cost, self.kernel_ridge
        if self.iterations_eval is not None and not self.training:
            return {"weights": svm_weights_inexact(*given, self.iterations_eval), "violation": exact}
        weights, violation = svm_weights(*given)
        return {"weights": weights, "violation": violation.to(weights.dtype)}

    def scores(self, state: State, query: Tensor) -> Tensor:
        weights = state["weights"]
        if self.head == "prototypes":
            return -self.scale * squared_euclidean(query, weights) / weights.shape[-1]
        return self.scale * linear_scores(query, weights)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over all queries of the smoothed cross-entropy; violation: the largest of the batch's tasks."""
        assert isinstance(batch, Episodes)
        state, logits = self.answers(batch, *self.both(batch))
        loss = smoothed_cross_entropy(logits, batch.query_labels, self.label_smoothing, over="others")
        return loss, {"accuracy": accuracy(logits, batch.query_labels), "violation": state["violation"].max()}
