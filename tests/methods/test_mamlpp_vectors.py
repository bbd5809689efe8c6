from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.batch import Episodes
from pipeline.methods.maml_plus_plus import MAMLPlusPlus, step_weights
from pipeline.nets.conv4 import Conv4
from tests.vectors.cases import VECTORS

CASES = "mamlpp_[abc]_*.npz"
NAMES = {"linear_weights": "head.weight", "linear_bias": "head.bias"} | {
    f"conv{i}_{theirs}": f"backbone.{ours.format(i)}"
    for i in range(2)
    for theirs, ours in (
        ("conv_weight", "convs.{}.weight"),
        ("conv_bias", "convs.{}.bias"),
        ("norm_layer_weight", "norms.{}.weight"),
        ("norm_layer_bias", "norms.{}.bias"),
    )
}


def build(case, **options) -> tuple[MAMLPlusPlus, dict[str, str]]:
    """The case's network with its parameters and rates, and from the case's names to the model's."""
    steps, epoch = int(case["in_steps"]), int(case["in_epoch"])
    widths = [len(case["in_conv0_conv_weight"]), len(case["in_conv1_conv_weight"])]
    backbone = Conv4(
        tuple(case["in_x_support"].shape[2:]),
        width=widths,
        bias=True,
        eps=float(case["meta_bn_eps"]),
        negative_slope=float(case["meta_leaky_slope"]),
    )
    method = MAMLPlusPlus(
        backbone,
        int(case["in_n_way"]),
        inner_steps=steps,
        inner_steps_eval=steps,
        multi_step_epochs=int(case["meta_msl_epochs"]),
        first_order_epochs=0 if int(case["in_second_order"]) else epoch + 1,
        **options,
    ).to(case["in_x_support"].dtype)
    names = dict(NAMES)
    for short in [n for n in NAMES if "norm" not in n]:
        names[f"lslr_{short}"] = f"rates.{NAMES[short].replace('.', '-')}"
    with torch.no_grad():
        for short, name in names.items():
            method.get_parameter(name).copy_(case[f"in_{short}"])
        method.steps_taken.fill_(epoch * method.epoch_steps)
    return method, names


def episodes(case, part: slice = slice(None)) -> Episodes:
    way = int(case["in_n_way"])
    tensors = [case[f"in_{k}"][part] for k in ("x_support", "y_support", "x_query", "y_query")]
    return Episodes(*tensors, torch.arange(way).expand(len(tensors[0]), way), way)


@pytest.mark.parametrize("form", ["loop", "vmap"])
def test_meta_loss_and_meta_gradient(case, check, form):
    method, names = build(case, inner_loop=form)
    loss, _ = method(episodes(case))
    loss.backward()
    check(loss, "out_meta_loss")
    for short, name in names.items():
        check(method.get_parameter(name).grad, f"out_grad_{short}")
    if method.epoch < method.multi_step_epochs:
        weights = step_weights(method.inner_steps, method.epoch, method.multi_step_epochs)
        check(torch.tensor(weights, dtype=loss.dtype), "out_importance_vector")


@pytest.mark.parametrize("form", ["loop", "vmap"])
def test_answers_all_at_once_and_one_by_one(case, check, form):
    method, _ = build(case, inner_loop=form)
    method.eval()
    parts = [slice(None)], [slice(t, t + 1) for t in range(len(case["in_x_support"]))]
    for slices in parts:
        with torch.no_grad():
            batches = [episodes(case, part) for part in slices]
            logits = [method.classify(method.adapt(e.support, e.support_labels), e.query) for e in batches]
        check(torch.cat(logits), "out_query_logits_last_step")


def test_step_weights():
    with np.load(VECTORS / "mamlpp_msl_schedule.npz") as arrays:
        for key in arrays:
            if key.startswith("out_msl_weights"):
                steps, epochs = (int("".join(c for c in part if c.isdigit())) for part in key.split("_")[-2:])
                found = [step_weights(steps, int(epoch), epochs) for epoch in arrays["in_epochs"]]
                np.testing.assert_allclose(found, arrays[key], rtol=0, atol=1e-12)
