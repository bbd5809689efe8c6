"""The SVM head against learn2learn's (one QP a task, qpth) and one batched qpth call: forward and backward, one core.

    pip install -r tests/benchmarks/requirements.txt      # in an environment of its own
    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/benchmarks/bench_svm.py [--rounds 9] [--features 1600 16000]

Every round times all of them one after the other on the same tasks; the table has medians over rounds, and the median
of the ratio within a round. The gradients' errors are against this head in float64, which is exact.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.functional.gram import linear_scores
from pipeline.functional.svm import svm_weights

try:
    from learn2learn.nn.metaoptnet import SVClassifier
    from qpth.qp import QPFunction
except ImportError as error:
    sys.exit(f"bench_svm: skipped, a peer is missing ({error}): see tests/benchmarks/requirements.txt")

TASKS, WAY, QUERY, COST = 8, 5, 6, 0.1
Tasks = tuple[Tensor, Tensor, Tensor, Tensor]  # support, labels, query, labels


def ours(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    return linear_scores(query, svm_weights(support, labels, WAY, COST)[0])


def learn2learn(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    return torch.stack([SVClassifier(s, y, WAY)(q) for s, y, q in zip(support, labels, query, strict=True)])


def batched_qpth(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    n, eye = support.shape[1], torch.eye
    hessian = torch.stack([torch.kron(k, eye(WAY)) for k in support @ support.mT]) + eye(n * WAY)
    y = F.one_hot(labels, WAY).flatten(1).to(support)
    sums = torch.kron(eye(n), torch.ones(1, WAY)).expand(TASKS, -1, -1)
    caps = eye(n * WAY).expand(TASKS, -1, -1)
    solve = QPFunction(verbose=False, maxIter=15)
    alpha = solve(hessian, -y, caps, COST * y, sums, torch.zeros(TASKS, n)).unflatten(1, (n, WAY))
    return query @ support.mT @ alpha


HEADS = {"learn2learn": learn2learn, "batched qpth": batched_qpth, "ours": ours}


def draw(shot: int, width: int, seed: int) -> Tasks:
    """Classes around random means, with images of norm about 6: some constraints active, most not."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(TASKS, WAY, width, generator=g)
    sides = []
    for count in (shot, QUERY):
        labels = torch.arange(WAY).repeat(count).expand(TASKS, -1).contiguous()
        images = torch.randn(TASKS, WAY * count, width, generator=g)
        sides += [(0.5 * means[:, labels[0]] + images) * 5 / width**0.5, labels]
    support, labels, query, query_labels = sides
    return support, labels, query, query_labels


def step(head: Callable[..., Tensor], tasks: Tasks) -> tuple[float, Tensor]:
    """Seconds of a forward and backward pass, and the gradient of the support."""
    support, labels, query, query_labels = tasks
    support, query = support.clone().requires_grad_(), query.clone().requires_grad_()
    start = time.perf_counter()
    F.cross_entropy(head(support, labels, query).flatten(0, 1), query_labels.flatten()).backward()
    seconds = time.perf_counter() - start
    assert support.grad is not None
    return seconds, support.grad


def measure(shot: int, width: int, rounds: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in HEADS}
    error = {}
    for i in range(rounds + 1):  # the first warms up
        tasks = draw(shot, width, seed=i)
        gradients = {}
        for name, head in HEADS.items():
            seconds, gradients[name] = step(head, tasks)
            times[name] += [seconds] if i else []
        support, labels, query, query_labels = tasks
        exact = step(ours, (support.double(), labels, query.double(), query_labels))[1]
        error |= {name: float((g - exact).norm() / exact.norm()) for name, g in gradients.items()}
    for name, seconds in times.items():
        ratio = statistics.median(theirs / mine for theirs, mine in zip(seconds, times["ours"], strict=True))
        print(
            f"{shot:5d} {width:7d}  {name:<13} {1e3 * statistics.median(seconds):9.1f} {1e3 * min(seconds):9.1f}"
            f" {ratio:8.1f}x {error[name]:10.0e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--features", type=int, nargs="+", default=[1600, 16000])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{TASKS} tasks of {WAY} ways and {QUERY} queries a class, float32, one thread; milliseconds")
    print(f"{'shot':>5} {'width':>7}  {'head':<13} {'median':>9} {'least':>9} {'ours is':>9} {'error':>10}")
    for width in arguments.features:
        for shot in (1, 5, 15):
            measure(shot, width, arguments.rounds)


if __name__ == "__main__":
    main()
