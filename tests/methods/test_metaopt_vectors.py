from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.batch import Episodes
from pipeline.functional.svm import crammer_singer
from pipeline.methods.metaopt import MetaOpt

CASES = "metaopt_*.npz"


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


def build(case, **options) -> MetaOpt:
    if "in_C_reg" in case:
        options |= {"cost": float(case["in_C_reg"].double()), "kernel_ridge": float(case["in_kernel_ridge"])}
        options["label_smoothing"] = round(float(case["in_label_smoothing_eps"]), 6)
        options["cost"] = round(options["cost"], 6)  # .1, also where the file was read in float32
    else:
        options |= {"head": "ridge", "penalty": float(case["in_lambda"]), "label_smoothing": 0.0}
    method = MetaOpt(Flat(case["in_support"].shape[1]), scale=float(case["in_scale"]), **options)
    return method.to(case["in_support"].dtype)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_method(case, check, copies, training):
    batch, orders = tasks(case, copies)
    method = build(case).train(training)
    loss, metrics = method(batch)
    (copies * loss).backward()
    check(loss, "out_loss_mean_smoothed" if "out_loss_mean_smoothed" in case else "out_loss_mean_ce")
    check(method.scale.grad / copies, "out_grad_scale")
    assert float(metrics["violation"]) <= 1e-10
    right = (case["out_logits"].argmax(-1) == case["in_query_labels"]).double().mean()
    assert float(metrics["accuracy"]) == pytest.approx(float(right))
    logits = method.classify(method.adapt(batch.support, batch.support_labels, batch.way), batch.query)
    for t in range(copies):
        support, query = orders["support"][t].argsort(), orders["query"][t].argsort()
        check(logits[t][query], "out_logits")
        check(logits[t][query] / method.scale, "out_raw_logits")
        check(batch.support.grad[t][support].flatten(1), "out_grad_support")
        check(batch.query.grad[t][query].flatten(1), "out_grad_query")


def test_dual_variables(case, check):
    support, labels, way = case["in_support"][None], case["in_support_labels"][None], int(case["in_n_way"])
    method = build(case)
    if "in_C_reg" not in case:  # the ridge's are not kept; its weights are made of them
        weights = method.adapt(support[..., None, None], labels, way)["weights"][0]
        expected = case["out_dual_alpha"].mT @ support[0]
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        return
    inner = support.double() @ support.double().mT
    found, _, _ = crammer_singer(inner, labels, way, method.cost, method.kernel_ridge)
    check(found.alpha[0].mT.to(support.dtype), "out_dual_alpha")
    check(found.multipliers[0].mT.to(support.dtype), "out_ineq_multipliers")


def test_named_deviations_of_the_code(case, check):
    """The R2-D2 head of the same file, and the three interior-point iterations that the test code stops after."""
    batch, _ = tasks(case, 1)
    svm = "in_C_reg" in case
    method = build(case, iterations_eval=3) if svm else build(case, factor=1.0)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            state = method.adapt(batch.support, batch.support_labels, batch.way)
            return method.classify(state, batch.query)[0] / method.scale

    method.eval()
    check(logits(), "out_qpth_maxiter3_raw_logits" if svm else "out_r2d2head_raw_logits")
    if svm:  # they are not the optimum, and in training nothing changes
        assert float((logits() - case["out_raw_logits"]).abs().max()) > 1e-3
        method.train()
        check(logits(), "out_raw_logits")
