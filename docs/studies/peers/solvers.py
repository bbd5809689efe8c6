"""Heads that solve a convex problem: forward and backward on one core, against quadratic programs by qpth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from docs.studies.benchmark.apart import Apart
from docs.studies.benchmark.rows import Bench, Finding, ratio, row
from docs.studies.peers.peers import peer
from pipeline.functional.gram import linear_scores
from pipeline.functional.ridge import metaopt_ridge_weights
from pipeline.functional.svm import svm_weights

TASKS, WAY, QUERY, WIDTH, COST, PENALTY = 8, 5, 15, 1600, 0.1, 50.0
SVM_TARGETS = {1: 10, 5: 12, 15: 22}  # by shots
Tasks = tuple[Tensor, Tensor, Tensor, Tensor]  # support, labels, query, labels
Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def svm(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    return linear_scores(query, svm_weights(support, labels, WAY, COST)[0])


def svm_learn2learn(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """One quadratic program a task."""
    head = peer("learn2learn.nn.metaoptnet").SVClassifier
    return torch.stack([head(s, y, WAY)(q) for s, y, q in zip(support, labels, query, strict=True)])


def svm_batched(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """One call of qpth for all tasks."""
    n, eye = support.shape[1], torch.eye
    hessian = torch.stack([torch.kron(k, eye(WAY)) for k in support @ support.mT]) + eye(n * WAY)
    y = F.one_hot(labels, WAY).flatten(1).to(support)
    sums = torch.kron(eye(n), torch.ones(1, WAY)).expand(TASKS, -1, -1)
    caps = eye(n * WAY).expand(TASKS, -1, -1)
    solve = peer("qpth.qp").QPFunction(verbose=False, maxIter=15)
    alpha = solve(hessian, -y, caps, COST * y, sums, torch.zeros(TASKS, n)).unflatten(1, (n, WAY))
    return query @ support.mT @ alpha


def ridge(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    return linear_scores(query, metaopt_ridge_weights(support, labels, WAY, PENALTY))


def ridge_qp(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """The same optimum as MetaOptNet asks for it: a program a class, with an inequality that says nothing."""
    n = support.shape[1]
    hessian = (support @ support.mT + PENALTY * torch.eye(n)).repeat_interleave(WAY, 0)
    y = F.one_hot(labels, WAY).mT.flatten(0, 1).to(support)
    nothing = torch.zeros(len(y), n, n)
    solve = peer("qpth.qp").QPFunction(verbose=False)
    alpha = solve(hessian, -2 * y, nothing, torch.zeros(len(y), n), torch.Tensor(), torch.Tensor())
    return query @ support.mT @ alpha.view(TASKS, WAY, n).mT


def draw(shot: int, seed: int) -> Tasks:
    """Classes around random means, with images of norm about 6: some constraints active, most not."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(TASKS, WAY, WIDTH, generator=g)
    sides = []
    for count in (shot, QUERY):
        labels = torch.arange(WAY).repeat(count).expand(TASKS, -1).contiguous()
        images = torch.randn(TASKS, WAY * count, WIDTH, generator=g)
        sides += [(0.5 * means[:, labels[0]] + images) * 5 / WIDTH**0.5, labels]
    support, labels, query, query_labels = sides
    return support, labels, query, query_labels


def step(head: Head, tasks: Tasks) -> tuple[float, Tensor]:
    """CPU milliseconds of a forward and backward pass, and the gradient of the support."""
    support, labels, query, query_labels = tasks
    support, query = support.clone().requires_grad_(), query.clone().requires_grad_()
    start = time.process_time()
    F.cross_entropy(head(support, labels, query).flatten(0, 1), query_labels.flatten()).backward()
    seconds = time.process_time() - start
    assert support.grad is not None
    return 1e3 * seconds, support.grad


def rounds(shot: int, ours: str, *others: str) -> Iterator[dict[str, tuple[float, float]]]:
    """CPU milliseconds of every head on the same tasks, one after the other, and the error of the support's gradient.

    The error is against this project's head in float64, which is exact.
    """
    seed = 0
    while True:
        tasks, found = draw(shot, seed), {}
        support, labels, query, query_labels = tasks
        exact = step(HEADS[ours], (support.double(), labels, query.double(), query_labels))[1]
        for name in (ours, *others):
            taken, gradient = step(HEADS[name], tasks)
            found[name] = taken, float((gradient - exact).norm() / exact.norm())
        seed += 1
        yield found


HEADS: dict[str, Head] = {
    "svm": svm, "learn2learn": svm_learn2learn, "qpth, batched": svm_batched, "ridge": ridge, "QP form": ridge_qp,
}  # fmt: skip


def _compare(bench: Bench, what: str, least: float, shot: int, ours: str, *others: str) -> Iterator[Finding]:
    with Apart(rounds, shot, ours, *others) as apart:
        apart()  # warms up
        found = [apart() for _ in range(4 * bench.repetitions)]
    times, errors = ({name: [r[name][part] for r in found] for name in (ours, *others)} for part in (0, 1))
    yield ratio(what, times, (others[0], ours), "CPU ms", least=least)
    yield ratio(f"{what}: error of the gradient", errors, (ours, others[0]), "of its norm", most=1)


@row("solvers")
def svm_head(bench: Bench) -> Iterator[Finding]:
    """SVM head against learn2learn's (qpth)."""
    peer("qpth"), peer("learn2learn")
    for shot, least in SVM_TARGETS.items():
        what = f"SVM head, forward and backward, {TASKS} episodes 5-way {shot}-shot, against learn2learn (qpth)"
        yield from _compare(bench, what, least, shot, "svm", "learn2learn", "qpth, batched")


@row("solvers")
def ridge_head(bench: Bench) -> Iterator[Finding]:
    """Ridge head against MetaOptNet's QP form."""
    peer("qpth")
    what = f"ridge head, forward and backward, {TASKS} episodes 5-way 5-shot, against MetaOptNet's QP form (qpth)"
    yield from _compare(bench, what, 20, 5, "ridge", "QP form")
