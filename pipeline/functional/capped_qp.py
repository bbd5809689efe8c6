"""Quadratic programs with the same Hessian for every class, whose classes sum to zero under caps.

For T tasks at once, over A [C, n] of each::

    minimise  1/2 <A, A H> - <L, A>   subject to  A <= U  and  sum_k A_ki = 0 for every column i,

with H [n, n] symmetric and positive definite. In the nC variables of a task the Hessian is I_C (x) H; thanks to that
structure only systems of n unknowns are solved. At the optimum, with multipliers M of the caps and v of the sums::

    A H - L + M + 1 v^T = 0,   A <= U,   M >= 0,   M_ki = 0 where A_ki < U_ki.

1. A few iterations of ADMM (Boyd et al. 2011, section 5.2) guess which entries are below their cap. Both of its steps
   are cheap: one takes the classes' mean away and multiplies with an inverse [n, n], the other is a minimum.
2. On a guessed face the conditions are linear, and solved to rounding. Where the solution exceeds a cap or has a
   negative multiplier, those entries change sides: a primal-dual active-set, that is semismooth Newton, method
   (Hintermueller, Ito & Kunisch 2002), which is at the optimum as soon as nothing changes.
3. Where that goes in circles, an interior-point method makes the guess for step 2.

Every stage is bounded in its number of steps, and the solution says how well the conditions hold.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

TOLERANCE = 1e-10  # violation of the conditions at which a task is solved; see _solution for its units
FACES = 8  # faces tried after each guess
RELAXATION, PENALTY = 1.7, 2.0  # of ADMM; the penalty in units of the geometric mean of H's eigenvalues
INTERIOR = 40  # iterations of the interior-point method, at most
INTERIOR_RESIDUAL = 1e-12  # at which it stops earlier
REFINEMENTS = 3  # of a linear system, at most


@dataclass(frozen=True)
class _Tensors:
    """Tensors that all lead with the tasks, indexed together."""

    def __getitem__(self, tasks: Tensor) -> Self:
        return type(self)(**{f.name: getattr(self, f.name)[tasks] for f in fields(self)})

    def put(self, tasks: Tensor, other: Self) -> None:
        for f in fields(self):
            getattr(self, f.name)[tasks] = getattr(other, f.name)


@dataclass(frozen=True)
class Program(_Tensors):
    hessian: Tensor  # [T, n, n]
    linear: Tensor  # [T, C, n]
    caps: Tensor  # [T, C, n]


@dataclass(frozen=True)
class Face(_Tensors):
    """Which entries are below their cap, and what solves linear systems among them."""

    free: Tensor  # bool [T, C, n]
    inverses: Tensor  # [T, C, n, n]: of each class's block of H over its free entries, 0 elsewhere
    sums: Tensor  # [T, n, n]: Cholesky factor of the sum of the inverses


@dataclass(frozen=True)
class Solution(Face):
    alpha: Tensor  # [T, C, n]
    multipliers: Tensor  # [T, C, n] of the caps
    violation: Tensor  # [T] of the conditions


def minimise(program: Program) -> Solution:
    """Solve all tasks: those whose ``violation`` is at most ``TOLERANCE`` exactly, up to rounding."""
    solution = _follow(program, _guess(program))
    hard = _unsolved(solution)
    if len(hard):
        rest = program[hard]
        alpha, slacks, multipliers, price = interior_point(rest, INTERIOR)
        free = slacks > multipliers
        for found in (_solution(rest, _among(rest, free), alpha, price), _follow(rest, free)):
            better = found.violation < solution.violation[hard]
            solution.put(hard[better], found[better])
    return solution


def derivative(hessian: Tensor, face: Face, direction: Tensor) -> Tensor:
    """How the optimum moves when L moves in ``direction`` [T, C, n], as long as it stays on its face."""
    return _solve(hessian, face, direction, torch.zeros_like(direction[:, :1]))[0]


Point = tuple[Tensor, ...]  # A, slacks and multipliers of the caps, each [T, C, n], and v [T, 1, n]


def interior_point(program: Program, iterations: int) -> Point:
    """By predictor and corrector steps (Mehrotra 1992), as in OptNet (Amos & Kolter 2017).

    Of the start and what it is after 1 to ``iterations - 1`` steps, that with the least residual.
    """
    H, L, U = program.hessian, program.linear, program.caps
    count = L[0].numel()
    point = _start(program)
    best, least = point, torch.full_like(H[:, 0, 0], torch.inf)
    for step in range(iterations):
        A, S, M, v = point
        dual, cap, total = A @ H - L + M + v, A + S - U, A.sum(1, keepdim=True)
        gap = (S * M).sum((1, 2)) / count
        residual = _norm(dual) + _norm(cap) + _norm(total) + count * gap.abs()
        better = (residual < least)[:, None, None]
        best = tuple(new.where(better, old) for new, old in zip(point, best, strict=True))
        least = torch.minimum(residual, least)
        if step + 1 == iterations or bool((least < INTERIOR_RESIDUAL).all()):
            break
        factors = _factor(H.unsqueeze(1) + torch.diag_embed(M / S))
        predicted = _direction(point, factors, dual, cap, total, S * M)
        length = _longest(point, predicted).clamp(max=1)
        after = ((S + length * predicted[1]) * (M + length * predicted[2])).sum((1, 2)) / count
        centre = (gap * (after / gap) ** 3)[:, None, None]
        complement = predicted[1] * predicted[2] - centre
        corrected = _direction(point, factors, dual * 0, cap * 0, total * 0, complement)
        move = tuple(p + c for p, c in zip(predicted, corrected, strict=True))
        length = (0.999 * _longest(point, move)).clamp(max=1)
        point = tuple(x + length * d for x, d in zip(point, move, strict=True))
    return best


def _guess(program: Program) -> Tensor:
    """Which entries ADMM leaves below their cap, bool [T, C, n].

    Its half-step without caps is (L' + p Z') (H + p I)^-1, where the dash takes the mean over classes away: that makes
    the sums zero and, as H is the same for all classes, commutes with the inverse.
    """
    H, L, U = program.hessian, program.linear, program.caps
    n = L.shape[-1]
    diagonal = torch.linalg.cholesky_ex(H)[0].diagonal(dim1=-2, dim2=-1)
    penalty = PENALTY * (2 * diagonal.log().mean(-1)).exp()[:, None, None]
    inverse = _inverse(H + penalty * torch.eye(n, dtype=H.dtype, device=H.device))
    start = RELAXATION * (L - L.mean(1, keepdim=True)) @ inverse
    step = RELAXATION * penalty * inverse
    wished = start  # the capped copy is min(wished, U), the price of the caps (times 1 / p) what that cuts off
    for _ in range(20 + n // 8):
        capped = torch.minimum(wished, U)
        reflected = torch.lerp(wished, capped, 2.0)
        reflected -= reflected.mean(1, keepdim=True)
        wished = torch.baddbmm(wished, reflected, step).add_(start).sub_(capped, alpha=RELAXATION)
    return wished < U


def _follow(program: Program, free: Tensor) -> Solution:
    """From a guess of the free entries, from face to face: for each task the best of those tried."""
    best = latest = _face(program, free)
    tasks = torch.arange(len(free), device=free.device)
    for _ in range(FACES - 1):
        wrong = _unsolved(latest)
        if not len(wrong):
            break
        tasks, program = tasks[wrong], program[wrong]
        exceeding, priced = latest.alpha[wrong] > program.caps, latest.multipliers[wrong] > 0
        latest = _face(program, ~torch.where(latest.free[wrong], exceeding, priced))
        better = latest.violation < best.violation[tasks]
        best.put(tasks[better], latest[better])
    return best


def _face(program: Program, free: Tensor) -> Solution:
    """The optimum among the A that are at their cap where not ``free``, however they lie to the other caps."""
    H, L, U = program.hessian, program.linear, program.caps
    face = _among(program, free)
    fixed = U.masked_fill(face.free, 0)
    moved, price = _solve(H, face, L - fixed @ H, -fixed.sum(1, keepdim=True))
    return _solution(program, face, fixed + moved, price)


def _among(program: Program, free: Tensor) -> Face:
    """Entries that are not free are made independent, by the rows and columns of an identity, and left out after."""
    H, U = program.hessian, program.caps
    stuck = ~free.any(1, keepdim=True)  # a column needs an entry that makes its sum zero: that of the largest cap
    free = free | (stuck & (U.amax(1, keepdim=True) == U))
    inside = free.to(H.dtype)
    blocks = H.unsqueeze(1) * (inside.unsqueeze(-1) * inside.unsqueeze(-2))
    blocks.diagonal(dim1=-2, dim2=-1).add_(1 - inside)
    inverses = _inverse(blocks)
    inverses.diagonal(dim1=-2, dim2=-1).mul_(inside)
    return Face(free, inverses, _sums(inverses))


def _solution(program: Program, face: Face, alpha: Tensor, price: Tensor) -> Solution:
    """With its violation, the larger of two: how far A exceeds caps, or is from those it should be at, in units of the
    largest |A|; and how far multipliers are negative, or not zero where free, in units of L, which is of order 1, or
    where |A| is so large that rounding A H costs more than that, in units of that rounding.
    """
    multipliers = program.linear - price - alpha @ program.hessian
    size = alpha.abs().amax((1, 2)).clamp(min=torch.finfo(alpha.dtype).tiny)
    over = alpha - program.caps
    over = torch.where(face.free, over, over.abs()).amax((1, 2)).clamp(min=0) / size
    slope = torch.where(face.free, multipliers.abs(), -multipliers).amax((1, 2))
    violation = torch.maximum(over, slope / (1 + 1e-5 * alpha.shape[2] * size))
    multipliers = multipliers.masked_fill(face.free, 0)
    return Solution(face.free, face.inverses, face.sums, alpha, multipliers, violation)


def _unsolved(solution: Solution) -> Tensor:
    return (~(solution.violation <= TOLERANCE)).nonzero().squeeze(1)  # NaN counts as unsolved


def _solve(hessian: Tensor, face: Face, right: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """X over the free entries, with column sums ``totals`` [T, 1, n], and v such that X H + 1 v^T = right there.

    Explicit inverses lose digits with the condition of H; refinement wins them back.
    """
    x, price = _eliminate(face.inverses, face.sums, right, totals)
    for _ in range(REFINEMENTS):
        residual = (right - price - x @ hessian).masked_fill(~face.free, 0)
        if bool((residual.abs().amax((1, 2)) <= 1e-13 * (right.abs().amax((1, 2)) + x.abs().amax((1, 2)))).all()):
            break
        more, change = _eliminate(face.inverses, face.sums, residual, totals - x.sum(1, keepdim=True))
        x, price = x + more, price + change
    return x, price


def _eliminate(inverses: Tensor, sums: Tensor, right: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """X_k = inverse_k (right_k - v) [T, C, n], with that v [T, 1, n] which makes their sum ``totals``."""
    unpriced = (inverses @ right.unsqueeze(-1)).squeeze(-1)
    price = torch.cholesky_solve((unpriced.sum(1, keepdim=True) - totals).mT, sums)
    return unpriced - (inverses @ price.unsqueeze(1)).squeeze(-1), price.mT


def _factor(blocks: Tensor) -> tuple[Tensor, Tensor]:
    inverses = _inverse(blocks)
    return inverses, _sums(inverses)


def _sums(inverses: Tensor) -> Tensor:
    return torch.linalg.cholesky_ex(inverses.sum(1))[0]


def _inverse(matrices: Tensor) -> Tensor:
    """Of symmetric positive definite [..., n, n]; useless, but finite, where rounding has made one indefinite."""
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(matrices)[0])


def _start(program: Program) -> Point:
    """The solution of the conditions with slacks for multipliers; slacks and multipliers shifted to be positive."""
    H, L, U = program.hessian, program.linear, program.caps
    factors = _factor(H.unsqueeze(1) + torch.diag_embed(torch.ones_like(L)))
    alpha, price = _eliminate(*factors, L + U, torch.zeros_like(L[:, :1]))
    return alpha, _positive(U - alpha), _positive(alpha - U), price


def _positive(x: Tensor) -> Tensor:
    """Raised so that the least of each task is 1, where it is negative."""
    least = x.amin((1, 2), keepdim=True)
    return torch.where(least < 0, x - least + 1, x)


def _direction(
    point: Point, factors: tuple[Tensor, Tensor], dual: Tensor, cap: Tensor, total: Tensor, complement: Tensor
) -> Point:
    """Newton's step at ``point`` for these residuals of stationarity, caps, sums and slacks times multipliers."""
    _, S, M, _ = point
    alpha, price = _eliminate(*factors, (complement - M * cap) / S - dual, -total)
    slack = -cap - alpha
    return alpha, slack, -(complement + M * slack) / S, price


def _longest(point: Point, move: Point) -> Tensor:
    """How many times [T, 1, 1] the move leaves slacks and multipliers at least zero."""
    (_, *positive, _), (_, *moves, _) = point, move
    ends = [torch.where(d < 0, -x / d, torch.inf) for x, d in zip(positive, moves, strict=True)]
    return torch.minimum(*ends).amin((1, 2), keepdim=True)


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)
