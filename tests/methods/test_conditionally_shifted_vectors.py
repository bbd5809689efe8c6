from __future__ import annotations

import pytest
import torch

from pipeline.functional.attention import mixture, recall
from pipeline.methods.conditionally_shifted import shifted_activation

CASES = "csn_attention*.npz"


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("copies", [1, 3])
def test_attention_and_shifts(case, check, similarity, copies):
    """Every task with its memories in an order of its own, and one place of the memory that holds nothing."""
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(len(case["in_keys"]), generator=generator) for _ in range(copies)])
    keys, values = case["in_keys"][orders], case["in_values"][orders]
    keys, values = (torch.cat([x, torch.full_like(x[:, :1], 9.0)], dim=1) for x in (keys, values))
    present = torch.ones(keys.shape[:2], dtype=torch.bool)
    present[:, -1] = False
    weights = recall(case["in_query_keys"].expand(copies, -1, -1), keys, present, similarity)
    shifts = mixture(weights, values)
    for t in range(copies):
        check(weights[t][:, orders[t].argsort()], f"out_att_{similarity}")
        check(shifts[t], f"out_shift_{similarity}")
        if similarity == "cosine":
            check(shifted_activation(case["in_pre_activation"], shifts[t]), "out_relu_plus_relu_shift")
            check(shifted_activation(case["in_pre_activation"], shifts[t], inside=True), "out_relu_pre_shift_inside")
