"""Logistic regression by Newton's method, in as many unknowns as there are images.

LR-D2 (Bertinetto et al. 2019, section 3.2): a fixed number of steps for every class against the rest, differentiated
through. And the softmax with a Gaussian prior over its weights (Bauer et al. 2017), solved to convergence, with
Laplace's approximation of its posterior: for linear models these are the formulas of Gaussian-process classification
(Rasmussen & Williams 2006, sections 3.4 and 3.5). And the plain multinomial regression with a penalty on its weights
(Tian et al. 2020). All in float64 (see :mod:`pipeline.functional.gram`).

Features are [T, n, d], labels int64 [T, n] in any order and number a class, of which -1 marks padding; the weights that
are returned are [T, way, d], the biases [T, way].
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.functional.gram import combine, labelled_gram
from pipeline.functional.losses import PADDING
from pipeline.functional.precision import in_float32
from pipeline.functional.prototypes import one_hot
from pipeline.functional.ridge import solve_ridge

TOLERANCE = 1e-11  # of the gradient with respect to the scores, at which a softmax is fitted
NEWTON, HALVINGS = 50, 20  # steps at most, and how often each may be halved
FITTED, STEPS = 1e-9, 2000  # likewise of the multinomial regression: tens of short steps, more at a higher cost


@in_float32
def irls_weights(
    features: Tensor, labels: Tensor, way: int, penalty: Tensor | float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Weights and biases of LR-D2 after iteratively reweighted least squares from zero (equations 8 and 9).

    Each step is X^T (X X^T + penalty diag(1 / s))^-1 z for X with a column of ones, s = p (1 - p) and
    z = X w + (y - p) / s; written with the square roots of s, nothing is divided by it. One regression a class against
    all others; for two classes a single one, of class 0 against class 1, whose score is 0 then.
    """
    real = (labels != PADDING).unsqueeze(1)
    targets = one_hot(labels, way, torch.float64).mT
    if way == 2:
        targets = targets[:, :1]
    inner = (labelled_gram(features, labels) + (real & real.mT)).unsqueeze(1)
    scores = torch.zeros_like(targets)
    for _ in range(iterations):
        scores = scores.clamp(-100, 100)  # where p is 0 or 1 long since
        root = ((F.logsigmoid(scores) + F.logsigmoid(-scores)) / 2).exp() * real
        error = torch.where(targets > 0, (-scores / 2).exp(), -(scores / 2).exp())  # (y - p) / root
        system = root.unsqueeze(-1) * inner * root.unsqueeze(-2)
        alpha = root * solve_ridge(system, (root * scores + error * real).unsqueeze(-1), penalty).squeeze(-1)
        scores = (inner @ alpha.unsqueeze(-1)).squeeze(-1)
    weights, biases = combine(alpha, features), alpha.sum(-1).to(features.dtype)
    return (F.pad(weights, (0, 0, 0, 1)), F.pad(biases, (0, 1))) if way == 2 else (weights, biases)


@torch.no_grad()
@in_float32
def multinomial_weights(features: Tensor, labels: Tensor, way: int, cost: float) -> tuple[Tensor, Tensor]:
    """The weights and biases that minimise ||W||^2 / 2 + cost sum_i -log softmax(W x_i + b)_{y_i}.

    As scikit-learn's ``LogisticRegression(C=cost)``; biases are free. Every step is Newton's with the upper bound
    I / 2 of the curvature diag(p) - p p^T of a softmax in its place (Boehning 1992), which is the same for all classes
    and all steps, so that a task needs one factorisation; Nesterov's momentum, restarted where it leads uphill
    (O'Donoghue & Candes 2015), makes them few. An optimum has A = cost (Y - p) for the weights W = A X.
    """
    real = (labels != PADDING).unsqueeze(-1).double()
    targets, inner = one_hot(labels, way, torch.float64), labelled_gram(features, labels)
    system = inner / 2 + torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device) / cost
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
    column = inverse @ real  # of the biases, which are eliminated
    share = column / (column * real).sum(1, keepdim=True)
    scored = torch.cat([inner, real], dim=2)  # [T, n, n + 1]: to scores, from A^T with a row of biases below
    solved = torch.cat([inverse - column @ share.mT, 2 * share.mT], dim=1)  # [T, n + 1, n]: to a step
    found = ahead = targets.new_zeros(len(targets), len(targets[0]) + 1, way)
    t = targets.new_ones(len(targets), 1, 1)
    for _ in range(STEPS):
        gradient = ((scored @ ahead).softmax(-1) - targets) * real + ahead[:, :-1] / cost
        going = gradient.abs().amax((1, 2), keepdim=True) > FITTED
        if not bool(going.any()):
            break
        moved = ahead - solved @ gradient
        uphill = (gradient * (scored @ (moved - found))).sum((1, 2), keepdim=True) > 0
        later = ((1 + (1 + 4 * t * t).sqrt()) / 2).where(~uphill, 1)
        momentum = ((t - 1) / later).where(~uphill, 0)
        ahead = (moved + momentum * (moved - found)).where(going, ahead)
        found, t = moved, later
    return combine(ahead[:, :-1].mT, features), ahead[:, -1].to(features.dtype)


@dataclass(frozen=True)
class SoftmaxFit:
    """The most probable scores A K of T tasks, and the curvature there."""

    alpha: Tensor  # A, [T, C, n]
    curvatures: Tensor  # [T, C, n, n]: D^1/2 (I + D^1/2 K D^1/2)^-1 D^1/2 for the probabilities D of each class
    total: Tensor  # [T, n, n]: Cholesky factor of their sum
    violation: Tensor  # [T]: largest entry of the gradient, A - (Y - probabilities)


@torch.no_grad()
def fit_softmax(gram: Tensor, labels: Tensor, way: int) -> SoftmaxFit:
    """The A that minimises 1/2 <A, A K> - sum_i log softmax(A K)_{y_i, i}: the posterior's mode.

    Newton's method (algorithm 3.3 there, for the step instead of its end), each step halved until it is best. The
    problem is strictly convex; an optimum has A = Y - softmax(A K).

    Args:
        gram: K, float64 [T, n, n], the prior covariance of a class's scores for the images, zero for padding.
    """
    real = (labels != PADDING).unsqueeze(1)
    targets = one_hot(labels, way, gram.dtype).mT
    alpha = torch.zeros_like(targets)
    lengths = 0.5 ** torch.arange(HALVINGS, dtype=gram.dtype, device=gram.device).view(-1, 1, 1, 1)
    for _ in range(NEWTON):
        fit, step = _newton_step(gram, targets, real, alpha)
        going = fit.violation > TOLERANCE
        if not bool(going.any()):
            break
        tried = alpha + lengths * step
        scores = tried @ gram
        losses = (tried * scores).sum((2, 3)) / 2 - (targets * scores.log_softmax(2)).sum((2, 3))
        least = losses.amin(0)
        best = (losses <= least + 1e-12 * (1 + least.abs())).byte().argmax(0)  # the longest, up to rounding
        alpha = torch.where(going[:, None, None], tried[best, torch.arange(len(best), device=best.device)], alpha)
    return fit


def _newton_step(gram: Tensor, targets: Tensor, real: Tensor, alpha: Tensor) -> tuple[SoftmaxFit, Tensor]:
    """What is known at A, and Newton's step from there."""
    p = (alpha @ gram).softmax(1) * real
    root = p.sqrt()
    system = root.unsqueeze(-1) * gram.unsqueeze(1) * root.unsqueeze(-2)
    system.diagonal(dim1=-2, dim2=-1).add_(1)
    inverses = torch.cholesky_inverse(torch.linalg.cholesky_ex(system)[0])
    curvatures = root.unsqueeze(-1) * inverses * root.unsqueeze(-2)
    total = torch.linalg.cholesky_ex(curvatures.sum(1) + torch.diag_embed((~real).squeeze(1).to(gram)))[0]
    gradient = alpha - (targets - p)
    pulled = (curvatures @ (gradient @ gram).unsqueeze(-1)).squeeze(-1)
    shared = torch.cholesky_solve(pulled.sum(1).unsqueeze(-1), total)
    step = pulled - (curvatures @ shared.unsqueeze(1)).squeeze(-1) - gradient
    return SoftmaxFit(alpha, curvatures, total, gradient.abs().amax((1, 2))), step


@torch.no_grad()
def score_covariance(curvatures: Tensor, total: Tensor, cross: Tensor, own: Tensor) -> Tensor:
    """Laplace's covariance between the classes' scores of queries (algorithm 3.4 there), [T, Q, C, C].

    Args:
        curvatures, total: of a :class:`SoftmaxFit`.
        cross: prior covariance of queries and images, [T, Q, n].
        own: prior variance of the queries, [T, Q].
    """
    seen = torch.einsum("tkij,tqj->tqki", curvatures, cross)
    whitened = torch.linalg.solve_triangular(total.unsqueeze(1), seen.mT, upper=False)
    left = own.unsqueeze(-1) - torch.einsum("tqki,tqi->tqk", seen, cross)
    return whitened.mT @ whitened + torch.diag_embed(left)


@torch.no_grad()
def expected_log_probabilities(means: Tensor, covariances: Tensor, samples: int, seed: int = 0) -> Tensor:
    """log E softmax(f) for Gaussian f [..., C], over ``samples`` draws and their negatives, the same everywhere."""
    way = means.shape[-1]
    noise = torch.randn(samples, way, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = torch.cat([noise, -noise]).to(means)
    values, vectors = torch.linalg.eigh(covariances)
    spread = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    drawn = means.unsqueeze(-2) + noise @ spread.mT
    return drawn.log_softmax(-1).logsumexp(-2) - math.log(2 * samples)
