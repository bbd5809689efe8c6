"""R2-D2 and LR-D2: meta-learning with differentiable closed-form solvers (Bertinetto et al. 2019)."""

import math

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.functional.gram import linear_scores
from pipeline.functional.logistic import irls_weights
from pipeline.functional.ridge import r2d2_weights
from pipeline.methods.base import State
from pipeline.methods.head import HeadMethod
from pipeline.nets.by_name import choose


class R2D2(HeadMethod):
    """A class is a column of a regression from embeddings to labels, solved anew for every task and differentiated.

    Args:
        backbone: the features, without batch-dependent parts at test.
        solver: "ridge": R2-D2, ridge regression onto one-hot labels (published 51.2 / 68.8 on mini-ImageNet, 98.6 /
            99.7 on 5-way Omniglot, with the paper's wide backbone). "logistic": LR-D2, Newton steps for a logistic
            regression of each class against the rest.
        penalty: lambda, on weights and bias. For ridge on the scale of the mean inner product of the support images;
            for logistic as it is (50 for many classes, 1 for two in the authors' experiments).
        learn_penalty: train log lambda with the network. The published runs do not.
        scale: for ridge, the start of alpha in the logits alpha * score + beta, which are both trained. The authors
            start from 10 on Omniglot and CIFAR-FS and from 1e-4 on mini-ImageNet. LR-D2's scores are its logits.
        iterations: Newton steps of the logistic solver (the authors': 5 or 1, and 10 for two classes).
        joint_forward: while training, embed support and query in one call, so that batch-norm sees both (the authors'
            code); false embeds them apart, as at test.
    """

    def __init__(
        self,
        backbone: nn.Module,
        solver: str = "ridge",
        penalty: float = 50.0,
        learn_penalty: bool = False,
        scale: float = 10.0,
        iterations: int = 5,
        joint_forward: bool = True,
    ) -> None:
        super().__init__(backbone)
        if penalty <= 0 or iterations < 1:
            raise PipelineError(f"penalty={penalty} must be above zero and iterations={iterations} at least 1")
        self.solver = choose("solver", solver, ("ridge", "logistic"))
        self.penalty, self.iterations, self.joint_forward = penalty, iterations, joint_forward
        self.log_penalty = nn.Parameter(torch.tensor(math.log(penalty))) if learn_penalty else None
        self.scale = nn.Parameter(torch.tensor(float(scale))) if solver == "ridge" else None
        self.bias = nn.Parameter(torch.zeros(())) if solver == "ridge" else None

    def fit(self, features: Tensor, labels: Tensor, way: int) -> State:
        """weights [T, way, D] and biases [T, way]."""
        penalty = self.penalty if self.log_penalty is None else self.log_penalty.exp()
        if self.solver == "ridge":
            weights, biases = r2d2_weights(features, labels, way, penalty)
        else:
            weights, biases = irls_weights(features, labels, way, penalty, self.iterations)
        return {"weights": weights, "biases": biases}

    def scores(self, state: State, query: Tensor) -> Tensor:
        """For two classes the cross-entropy of LR-D2's is that of a sigmoid."""
        scores = linear_scores(query, state["weights"]) + state["biases"].unsqueeze(-2)
        return scores if self.scale is None or self.bias is None else self.scale * scores + self.bias
