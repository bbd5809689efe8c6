from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.batch import Episodes
from pipeline.functional.distances import DISTANCES, squared_euclidean_exact
from pipeline.functional.prototypes import prototypes
from pipeline.methods.prototypical import Prototypical

CASES = "proto_*.npz"
NAMES = {"squared_euclidean": "sq", "euclidean": "l2", "cosine": "cos", "dot": "dot"}


class Flat(nn.Flatten):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_features = features


def tasks(case, copies: int) -> Episodes:
    """The case's episode ``copies`` times, its support and queries shuffled differently in each."""
    generator = torch.Generator().manual_seed(0)
    orders = {
        k: torch.stack([torch.randperm(len(case[f"in_{k}"]), generator=generator) for _ in range(copies)])
        for k in ("support", "query")
    }
    if copies == 1:
        orders = {k: torch.arange(o.shape[1])[None] for k, o in orders.items()}
    tensors = {}
    for k, order in orders.items():
        tensors[k] = case[f"in_{k}"][order][..., None, None].requires_grad_()
        tensors[f"{k}_labels"] = case[f"in_{k}_labels"][order]
    way = int(case["in_n_way"])
    batch = Episodes(classes=torch.arange(way).expand(copies, way), way=way, **tensors)
    return batch, orders


@pytest.mark.parametrize("distance", NAMES)
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_method(case, check, distance, copies, joint, training):
    batch, orders = tasks(case, copies)
    method = Prototypical(Flat(batch.support.shape[2]), distance=distance, joint_forward=joint)
    method.to(batch.support.dtype).train(training)
    name = NAMES[distance]
    loss, metrics = method(batch)
    (copies * loss).backward()
    check(loss, f"out_loss_{name}")
    assert float(metrics["accuracy"]) == pytest.approx(float(case[f"out_acc_{name}"]))
    state = method.adapt(batch.support, batch.support_labels, batch.way)
    logits = method.classify(state, batch.query)
    for t in range(copies):
        support, query = orders["support"][t].argsort(), orders["query"][t].argsort()
        check(state["prototypes"][t], "out_prototypes")
        check(-logits[t][query], f"out_dist_{name}")
        check(logits[t][query].log_softmax(-1), f"out_logprob_{name}")
        assert torch.equal(logits[t][query].argmax(-1), case[f"out_pred_{name}"])
        check(batch.support.grad[t][support].flatten(1), f"out_grad_support_{name}")
        check(batch.query.grad[t][query].flatten(1), f"out_grad_query_{name}")


def test_functions(case, check):
    way = int(case["in_n_way"])
    means, counts = prototypes(case["in_support"][None], case["in_support_labels"][None], way)
    check(means[0], "out_prototypes")
    assert torch.equal(counts[0].long(), case["in_support_labels"].bincount(minlength=way))
    for distance, name in NAMES.items():
        check(DISTANCES[distance](case["in_query"], means[0]), f"out_dist_{name}")
    check(squared_euclidean_exact(case["in_query"], means[0]), "out_dist_sq")
    check(-squared_euclidean_exact(case["in_query"], means[0]) / means.shape[-1], "out_logits_sq_div_d")
