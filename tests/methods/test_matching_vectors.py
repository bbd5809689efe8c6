from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.batch import Episodes
from pipeline.functional.attention import attention, cosine_sums, log_attended, log_sharpened
from pipeline.functional.distances import DISTANCES
from pipeline.functional.prototypes import one_hot
from pipeline.methods.matching import Matching

CASES = "matching_*.npz"
NAMES = {"cosine": "cos", "squared_euclidean": "sq"}


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


@pytest.mark.parametrize("distance", NAMES)
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_method(case, check, distance, copies, joint, training):
    batch, orders = tasks(case, copies)
    method = Matching(Flat(batch.support.shape[2]), distance=distance, joint_forward=joint).train(training)
    name = NAMES[distance]
    loss, metrics = method(batch)
    (copies * loss).backward()
    check(loss, f"out_loss_{name}")
    expected = (case[f"out_pred_{name}"].argmax(-1) == case["in_query_labels"]).double().mean()
    assert float(metrics["accuracy"]) == pytest.approx(float(expected))
    logits = method.classify(method.adapt(batch.support, batch.support_labels, batch.way), batch.query)
    for t in range(copies):
        support, query = orders["support"][t].argsort(), orders["query"][t].argsort()
        check(logits[t][query].exp(), f"out_pred_{name}")
        check(logits[t][query].softmax(-1), f"out_pred_{name}")
        check(batch.support.grad[t][support].flatten(1), f"out_grad_support_{name}")
        check(batch.query.grad[t][query].flatten(1), f"out_grad_query_{name}")


@pytest.mark.parametrize(("prediction", "key"), [("ravi", "ravi_logits"), ("closer", "closer_logprob")])
@pytest.mark.parametrize("copies", [1, 3])
def test_predictions_of_official_code(case, check, prediction, key, copies):
    batch, orders = tasks(case, copies)
    method = Matching(Flat(batch.support.shape[2]), prediction=prediction)
    check(method(batch)[0], f"out_{prediction}_loss")
    logits = method.classify(method.adapt(batch.support, batch.support_labels, batch.way), batch.query)
    for t in range(copies):
        check(logits[t][orders["query"][t].argsort()], f"out_{key}")


def test_functions(case, check):
    support, query = case["in_support"][None], case["in_query"][None]
    members = one_hot(case["in_support_labels"], int(case["in_n_way"]))[None]
    for distance, name in NAMES.items():
        distances = DISTANCES[distance](query, support)
        check(attention(-distances, members.any(-1))[0], f"out_attention_{name}")
        check(log_attended(distances, members)[0].exp(), f"out_pred_{name}")
    check(cosine_sums(query, support, members)[0], "out_ravi_logits")
    check(log_sharpened(query, support, members)[0], "out_closer_logprob")
