from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.batch import Episodes
from pipeline.functional.ridge import r2d2_weights
from pipeline.methods.r2d2 import R2D2

CASES = "r2d2_*.npz"


class Flat(nn.Flatten):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_features = features


def tasks(case, copies: int) -> tuple[Episodes, dict[str, torch.Tensor]]:
    """The case's episode ``copies`` times, its support and queries shuffled differently in each."""
    generator = torch.Generator().manual_seed(0)
    orders, tensors = {}, {}
    for k in ("support", "query"):
        n = len(case[f"in_{k}"])
        orders[k] = torch.stack([torch.randperm(n, generator=generator) for _ in range(copies)])
        if copies == 1:
            orders[k] = torch.arange(n)[None]
        tensors[k] = case[f"in_{k}"][orders[k]][..., None, None].requires_grad_()
        tensors[f"{k}_labels"] = case[f"in_{k}_labels"][orders[k]]
    way = int(case["in_n_way"])
    return Episodes(classes=torch.arange(way).expand(copies, way), way=way, **tensors), orders


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_method(case, check, copies, joint, training):
    batch, orders = tasks(case, copies)
    penalty = float(case["in_lambda"])
    method = R2D2(Flat(batch.support.shape[2]), penalty=penalty, learn_penalty=True, joint_forward=joint)
    method.to(batch.support.dtype).train(training)
    with torch.no_grad():
        method.scale.copy_(case["in_scale"])
        method.bias.copy_(case["in_adjust_bias"])
        method.log_penalty.copy_(case["in_lambda"].log())
    loss, metrics = method(batch)
    (copies * loss).backward()
    check(loss, "out_loss_mean")
    check(method.scale.grad / copies, "out_grad_scale")
    check(method.bias.grad / copies, "out_grad_bias")
    check(method.log_penalty.grad / penalty / copies, "out_grad_lambda")
    state = method.adapt(batch.support, batch.support_labels, batch.way)
    logits = method.classify(state, batch.query)
    for t in range(copies):
        support, query = orders["support"][t].argsort(), orders["query"][t].argsort()
        check(state["weights"][t].mT, "out_weights_DxC")
        check(state["biases"][t], "out_bias_C")
        check(logits[t][query], "out_logits")
        check((logits[t][query] - method.bias) / method.scale, "out_raw_scores")
        check(batch.support.grad[t][support].flatten(1), "out_grad_support")
        check(batch.query.grad[t][query].flatten(1), "out_grad_query")
    right = (case["out_logits"].argmax(-1) == case["in_query_labels"]).double().mean()
    assert float(metrics["accuracy"]) == pytest.approx(float(right))


@pytest.mark.parametrize("form", ["primal", "woodbury", "smaller"])
def test_forms(case, form):
    features = case["in_support"][None]
    found = r2d2_weights(features, case["in_support_labels"][None], int(case["in_n_way"]), case["in_lambda"], form)
    close = 1e-10 if features.dtype == torch.float64 else 1e-5
    for value, expected in zip(found, (case["out_weights_DxC"].mT[None], case["out_bias_C"][None]), strict=True):
        assert float((value - expected).norm() / expected.norm()) < close
