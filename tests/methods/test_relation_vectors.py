from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.batch import Episodes
from pipeline.methods.relation import Relation, class_maps, relation_loss
from pipeline.nets.relation_module import RelationModule

CASES = "relation_*.npz"


class Maps(nn.Flatten):
    """An encoder whose images are their feature maps already."""

    def __init__(self, shape) -> None:
        super().__init__()
        self.map_shape, self.out_features = shape, shape[0] * shape[1] * shape[2]


def load(module: RelationModule, case) -> None:
    names = {f"fc{i}.{k}": f"fc{i}_{k}" for i in (1, 2) for k in ("weight", "bias")}
    for kind, place in (("convs", 0), ("norms", 1)):
        names |= {f"{kind}.{i}.{k}": f"layer{i + 1}_{place}_{k}" for i in range(2) for k in ("weight", "bias")}
    module.load_state_dict({ours: case[f"in_{theirs}"] for ours, theirs in names.items()}, strict=True)


def labels(case) -> torch.Tensor:
    return torch.arange(int(case["in_n_way"])).repeat_interleave(int(case["in_n_shot"]))


def build(case, **options) -> Relation:
    shape = tuple(case["in_support_maps"].shape[1:])
    width, hidden = case["in_layer1_0_weight"].shape[0], case["in_fc1_weight"].shape[0]
    method = Relation(Maps(shape), width, hidden, **options)
    statistics = "batch_statistics" if method.transductive else "batch"
    eps = float(case["meta_bn_eps"])
    method.relation = RelationModule(shape, width, hidden, statistics=statistics, bias=True, eps=eps)
    method.to(case["in_support_maps"].dtype)
    if method.transductive:
        load(method.relation, case)
    return method


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_method(case, check, copies, training, tasks):
    """Every task in an order of its own, all of them at once."""
    method = build(case, tasks=tasks).train(training)
    generator = torch.Generator().manual_seed(0)
    orders = [
        torch.stack([torch.randperm(len(case[f"in_{k}_maps"]), generator=generator) for _ in range(copies)])
        for k in ("support", "query")
    ]
    support, query = (case[f"in_{k}_maps"][o] for k, o in zip(("support", "query"), orders, strict=True))
    support.requires_grad_()
    way = int(case["in_n_way"])
    batch = Episodes(
        support, labels(case)[orders[0]], query, case["in_query_labels"][orders[1]], torch.zeros(copies, way), way
    )
    loss, metrics = method(batch)
    (copies * loss).backward()
    check(loss, "out_loss_mse_mean")
    right = (case["out_pred"] == case["in_query_labels"]).double().mean()
    assert float(metrics["accuracy"]) == pytest.approx(float(right))
    logits = method.classify(method.adapt(support, batch.support_labels, way), query)
    for t in range(copies):
        check(logits[t][orders[1][t].argsort()].sigmoid(), "out_relation_scores")
        assert torch.equal(logits[t][orders[1][t].argsort()].argmax(-1), case["out_pred"])
        check(support.grad[t][orders[0][t].argsort()], "out_grad_support_maps")


def test_module_without_bias_is_the_same(case, check):
    """Batch-norm takes the bias of the convolutions away."""
    shape = tuple(case["in_support_maps"].shape[1:])
    module = RelationModule(shape, case["in_layer1_0_weight"].shape[0], case["in_fc1_weight"].shape[0])
    module.to(case["in_support_maps"].dtype)
    load_without = {k: v for k, v in build(case).relation.state_dict().items() if not k.endswith("convs.0.bias")}
    module.load_state_dict({k: v for k, v in load_without.items() if k != "convs.1.bias"})
    maps = class_maps(case["in_support_maps"][None], labels(case)[None], int(case["in_n_way"]))
    scores = module(maps, case["in_query_maps"][None])
    check(scores[0].sigmoid(), "out_relation_scores")
    check(relation_loss(scores, case["in_query_labels"][None]), "out_loss_mse_mean")
