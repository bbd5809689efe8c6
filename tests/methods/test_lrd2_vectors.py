from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.methods.r2d2 import R2D2

CASES = "lrd2_*.npz"


class Flat(nn.Flatten):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_features = features


@pytest.mark.parametrize("copies", [1, 3])
def test_method(case, check, copies):
    images = case["in_support"]
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(len(images), generator=generator) for _ in range(copies)])
    method = R2D2(
        Flat(images.shape[1]),
        solver="logistic",
        penalty=float(case["in_lambda"]),
        iterations=int(case["in_irls_iterations"]),
    ).eval()
    state = method.adapt(images[orders][..., None, None], case["in_support_labels"][orders])
    logits = method.classify(state, case["in_query"][..., None, None].expand(copies, -1, -1, 1, 1))
    outputs = case["out_query_scores"].flatten(1).shape[1]  # one for two classes
    for t in range(copies):
        found = torch.cat([state["weights"][t], state["biases"][t].unsqueeze(-1)], dim=-1)
        check(found[:outputs].mT.reshape(case["out_weights_incl_bias"].shape), "out_weights_incl_bias")
        check(logits[t, :, :outputs].reshape(case["out_query_scores"].shape), "out_query_scores")
