from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.functional.distances import euclidean
from pipeline.methods.siamese import Siamese, contrastive, every_weighted_l1, weighted_l1

CASES = "siamese_*.npz"


class Flat(nn.Flatten):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_features = features


def test_pairs(case, check):
    names = ("in_h1", "in_h2", "in_alpha", "in_bias")
    leaves = [case[name].clone().requires_grad_() for name in names]
    logits = weighted_l1(*leaves)
    check(logits, "out_logit")
    check(logits.sigmoid(), "out_prob")
    loss = F.binary_cross_entropy_with_logits(logits, case["in_same"])
    check(loss, "out_loss_bce_mean")
    loss.backward()
    for leaf, name in zip(leaves, names, strict=True):
        check(leaf.grad, name.replace("in_", "out_grad_"))
    every = every_weighted_l1(*(case[name] for name in names))
    check(every.diagonal(), "out_logit")


def test_contrastive(case, check):
    distance = euclidean(case["in_h1"].unsqueeze(1), case["in_h2"].unsqueeze(1)).flatten()
    check(contrastive(distance, case["in_same"] == 1, margin=1.0), "out_contrastive_mean_margin1")


@pytest.mark.parametrize("shots", ["mean", "max"])
@pytest.mark.parametrize("copies", [1, 3])
def test_one_shot_trials(case, check, shots, copies):
    support, query = (case[f"in_trial_{k}"] for k in ("support", "query"))
    method = Siamese(Flat(support.shape[1]), shots=shots).to(support.dtype).eval()
    method.load_state_dict({"alpha": case["in_alpha"], "bias": case["in_bias"]})
    orders = torch.stack([torch.randperm(len(support)) for _ in range(copies)])
    with torch.no_grad():
        state = method.adapt(support[orders][..., None, None], orders)
        logits = method.classify(state, query.expand(copies, -1, -1)[..., None, None])
    for task in logits:
        check(task.sigmoid(), "out_trial_scores")
        assert torch.equal(task.argmax(-1), case["out_trial_pred"])
