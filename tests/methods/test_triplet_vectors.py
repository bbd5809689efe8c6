from __future__ import annotations

import pytest
import torch

from pipeline.batch import Episodes
from pipeline.functional.distances import euclidean, squared_euclidean
from pipeline.functional.triplets import candidates, mine, negatives, positives, reduce
from pipeline.methods.triplet import Triplet
from tests.methods.test_siamese_vectors import Flat

CASES = "triplet_*.npz"
METRICS = {"sq": squared_euclidean, "l2": euclidean}
MARGINS = {"m0p2": 0.2, "m1p0": 1.0}
FORMS = {
    "batchall_mean": ("batch_all", "mean"),
    "batchall_sum": ("batch_all", "sum"),
    "batchall_mean_nonzero": ("batch_all", "mean_nonzero"),
    "semihard_mean": ("semi_hard", "mean"),
    "batchhard_mean": ("batch_hard", "mean"),
}
GRADIENTS = {"batchall_mean": "batchall_mean", "semihard_mean": "semihard"}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("copies", [1, 3])
def test_losses(case, check, metric, margin, form, copies):
    mining, reduction = FORMS[form]
    order = torch.stack([torch.randperm(len(case["in_labels"])) for _ in range(copies)])
    x = case["in_embeddings"][order].requires_grad_()
    mined = mine(METRICS[metric](x, x), case["in_labels"][order], mining, MARGINS[margin])
    losses = reduce(mined, reduction)
    losses.sum().backward()
    for t in range(copies):
        check(losses[t], f"out_{form}_{metric}_{margin}")
        if form in GRADIENTS:
            check(x.grad[t][order[t].argsort()], f"out_grad_{GRADIENTS[form]}_{metric}_{margin}")


@pytest.mark.parametrize("metric", METRICS)
def test_distances_and_triplets(case, check, metric):
    x, labels = case["in_embeddings"], case["in_labels"]
    distances = METRICS[metric](x, x)
    check(distances, f"out_pdist_{metric}")
    every = (positives(labels)[:, :, None] & negatives(labels)[:, None, :]).nonzero()
    assert torch.equal(every, case["in_all_triplets"])
    for name, margin in MARGINS.items():
        semi_hard, violating = (candidates(distances, labels, margin, beyond) for beyond in (True, False))
        assert torch.equal(semi_hard, case[f"out_semihard_mask_{metric}_{name}"])
        assert torch.equal(violating, case[f"out_violating_mask_{metric}_{name}"])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", FORMS)
def test_method(case, check, metric, form):
    """The batch as a task: any part of it support, the rest queries."""
    mining, reduction = FORMS[form]
    x, labels = case["in_embeddings"][None, :, :, None, None], case["in_labels"][None]
    way = int(labels.max()) + 1
    method = Triplet(Flat(x.shape[2]), mining=mining, reduction=reduction, squared=metric == "sq").to(x.dtype)
    batch = Episodes(x[:, :5], labels[:, :5], x[:, 5:], labels[:, 5:], torch.arange(way)[None], way)
    check(method(batch)[0], f"out_{form}_{metric}_m0p2")
