"""Ridge regression onto one-hot labels, in the form whose linear system is the smaller.

Differentiable solvers as base learners: R2-D2 (Bertinetto et al. 2019) and MetaOptNet-RR (Lee et al. 2019). Systems are
float64 whatever the features are (see :mod:`pipeline.functional.gram`).
"""

import torch
from torch import Tensor

from pipeline.functional.gram import combine, labelled_gram
from pipeline.functional.losses import PADDING
from pipeline.functional.precision import in_float32
from pipeline.functional.prototypes import one_hot


def solve_ridge(matrix: Tensor, right: Tensor, penalty: Tensor | float) -> Tensor:
    """(G + penalty I)^-1 R for G symmetric and positive semidefinite: [T, n, n] and [T, n, m] give [T, n, m]."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factors, _ = torch.linalg.cholesky_ex(matrix + penalty * identity)  # NaN stays NaN, without an exception
    return torch.cholesky_solve(right, factors)


@in_float32
def r2d2_weights(
    features: Tensor, labels: Tensor, way: int, penalty: Tensor | float, form: str = "smaller"
) -> tuple[Tensor, Tensor]:
    """W and b that minimise ||[X, 1] [W; b] - Y||^2 / N + penalty ||[W; b]||^2 (R2-D2, equations 4 and 6).

    N is the number of images. The authors' code divides X, the column of ones and Y by sqrt(N); the penalty is then on
    the scale of the mean inner product, and it holds for the bias too.

    Args:
        features: X, [T, n, d].
        labels: int64 [T, n], in any order and number a class; -1 marks padding.
        form: "primal", a system of d + 1; "woodbury", one of n; or "smaller" of the two.

    Returns:
        Weights [T, way, d] and biases [T, way].
    """
    real = (labels != PADDING).unsqueeze(-1)
    y = one_hot(labels, way, torch.float64)
    n, d = features.shape[-2:]
    count = real.sum(1, keepdim=True)
    if form == "woodbury" or (form == "smaller" and n <= d + 1):
        inner = labelled_gram(features, labels) + (real & real.mT)
        alpha = solve_ridge(inner / count, y, penalty) / count
        return combine(alpha.mT, features), alpha.sum(1).to(features.dtype)
    columns = torch.cat([features, torch.ones_like(features[..., :1])], dim=-1).double() * real
    weights = solve_ridge(columns.mT @ columns / count, columns.mT @ y / count, penalty).mT.to(features.dtype)
    return weights[..., :-1].contiguous(), weights[..., -1].contiguous()


@in_float32
def metaopt_ridge_weights(
    features: Tensor, labels: Tensor, way: int, penalty: Tensor | float = 50.0, factor: float = 2.0
) -> Tensor:
    """Weights [T, way, d] of MetaOptNet-RR: w_k = sum_i A_ik x_i, A = factor (X X^T + penalty I)^-1 Y.

    No bias, and no division by the number of images. The factor is 2 because the authors' code minimises
    1/2 <A, G A> - 2 <Y, A>; the R2D2 head beside it has 1. A learned scale of the logits can make up for it.
    """
    alpha = factor * solve_ridge(labelled_gram(features, labels), one_hot(labels, way, torch.float64), penalty)
    return combine(alpha.mT, features)
