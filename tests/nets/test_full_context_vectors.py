from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.batch import Episodes
from pipeline.methods.matching import Matching
from pipeline.nets.full_context import QueryContext, SupportContext

CASES = "fce_*.npz"
READINGS = {"added": "added_readout", "concat": "concat_readout", "closer": "closerlook", "ravi": "ravi"}


class Flat(nn.Flatten):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_features = features


def load(module: nn.Module, values: dict[str, torch.Tensor]) -> nn.Module:
    module.to(next(iter(values.values())).dtype).load_state_dict(values)
    return module


def support_context(case, aligned: bool = True) -> SupportContext:
    names = {"weight_ih_l0": "wih", "weight_hh_l0": "whh", "bias_ih_l0": "bih", "bias_hh_l0": "bhh"}
    values = {
        f"{side}.{name}": case[f"in_g_{short}_{side[0]}"]
        for side in ("forwards", "backwards")
        for name, short in names.items()
    }
    return load(SupportContext(case["in_support"].shape[1], aligned), values)


def query_context(case, reading: str) -> QueryContext:
    ih = "wih_concat_in" if reading in ("closer", "ravi") else "wih"
    hh = "whh_concat" if reading == "concat" else "whh"
    values = {"weight_ih": f"in_f_{ih}", "weight_hh": f"in_f_{hh}", "bias_ih": "in_f_bih", "bias_hh": "in_f_bhh"}
    module = QueryContext(case["in_support"].shape[1], reading, int(case["in_unroll_steps"]))
    return load(module, {name: case[key] for name, key in values.items()})


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("padding", [0, 2])
def test_support(case, check, copies, padding):
    """Padding is passed over, wherever it stands."""
    items = torch.cat([torch.full_like(case["in_support"], 9.0)[:padding], case["in_support"]]).expand(copies, -1, -1)
    present = (torch.arange(items.shape[1]) >= padding).expand(copies, -1)
    hidden = case["out_g_hidden_forward"] + case["out_g_hidden_backward"] + case["in_support"]
    torch.testing.assert_close(hidden, case["out_g_support"])
    for task in support_context(case)(items, present):
        check(task[padding:], "out_g_support")
    for task in support_context(case, aligned=False)(items, present):
        check(task[padding:], "out_g_support_ravi_misaligned")


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("copies", [1, 3])
def test_query(case, check, reading, copies):
    items = case["out_g_support"].expand(copies, -1, -1)
    queries = case["in_query"].expand(copies, -1, -1)
    present = torch.ones(items.shape[:2], dtype=torch.bool)
    for task in query_context(case, reading)(queries, items, present):
        check(task, f"out_f_query_{READINGS[reading]}")


@pytest.mark.parametrize("reading", ["added", "concat"])
@pytest.mark.parametrize("training", [True, False])
def test_method(case, check, reading, training):
    way, width = int(case["in_n_way"]), case["in_support"].shape[1]
    method = Matching(Flat(width), full_context=True, reading=reading, shuffle_support=False)
    method.support_context, method.query_context = support_context(case), query_context(case, reading)
    method.train(training)
    order = torch.stack([torch.arange(len(case["in_query"])), torch.randperm(len(case["in_query"]))])
    support, query = (x[..., None, None] for x in (case["in_support"].expand(2, -1, -1), case["in_query"][order]))
    labels, query_labels = case["in_support_labels"].expand(2, -1), case["in_query_labels"][order]
    batch = Episodes(support, labels, query, query_labels, torch.arange(way).expand(2, way), way)
    check(method(batch)[0], f"out_loss_{READINGS[reading]}")
    logits = method.classify(method.adapt(support, labels, way), query)
    for t in range(2):
        check(logits[t][order[t].argsort()].exp(), f"out_pred_{READINGS[reading]}")
