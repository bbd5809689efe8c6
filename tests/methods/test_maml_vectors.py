from __future__ import annotations

import pytest
import torch

from pipeline.batch import Episodes
from pipeline.functional.losses import labelled, summed_cross_entropy
from pipeline.methods.maml import MAML
from pipeline.nets.conv4 import Conv4
from pipeline.nets.mlp import MLP

CASES = "[am][na][im]l_*.npz"
MLP_NAMES = {"W1": "backbone.layers.0.weight", "b1": "backbone.layers.0.bias", "W2": "head.weight", "b2": "head.bias"}
CONV_NAMES = {"fc_w": "head.weight", "fc_b": "head.bias"} | {
    f"{kind}{i + 1}_{short}": f"backbone.{module}.{i}.{name}"
    for i in range(2)
    for kind, module, pairs in (("conv", "convs", "wb"), ("bn", "norms", "gb"))
    for short, name in zip(pairs, ("weight", "bias"), strict=True)
}


def build(case, **options) -> tuple[MAML, dict[str, str]]:
    """The case's network with its parameters, and from the case's names to the model's."""
    way, x = int(case["in_n_way"]), case["in_x_support"]
    options |= {"inner_lr": float(case["in_inner_lr"]), "inner_steps": int(case["in_steps"])}
    if "in_W1" in case:
        names, backbone = MLP_NAMES, MLP((x.shape[2], 1, 1), widths=[case["in_W1"].shape[0]])
    else:
        names = CONV_NAMES
        widths = [case["in_conv1_w"].shape[0], case["in_conv2_w"].shape[0]]
        backbone = Conv4(tuple(x.shape[2:]), width=widths, bias=True, eps=float(case["meta_bn_eps"]))
    method = MAML(backbone, way, **options).to(x.dtype)
    with torch.no_grad():
        for short, name in names.items():
            method.get_parameter(name).copy_(case[f"in_{short}"])
    return method, names


def episodes(case) -> Episodes:
    way = int(case["in_n_way"])
    images = {k: case[f"in_x_{k}"] for k in ("support", "query")}
    images = {k: x if x.ndim == 5 else x[..., None, None] for k, x in images.items()}
    tasks = len(images["support"])
    return Episodes(
        support_labels=case["in_y_support"],
        query_labels=case["in_y_query"],
        classes=torch.arange(way).expand(tasks, way),
        way=way,
        **images,
    )


@pytest.mark.parametrize("form", ["loop", "vmap"])
@pytest.mark.parametrize("scaling", ["mean", "finn"])
@pytest.mark.parametrize("order", [1, 2])
def test_meta_loss_and_meta_gradient(case, check, form, scaling, order):
    anil = "out_meta_loss" in case  # these cases are by the mean only
    scaling = "mean" if anil else scaling
    prefix = "out_" if anil else f"out_{scaling}_"
    adapted = "head" if anil else "all"
    method, names = build(case, loss_scaling=scaling, first_order=order == 1, inner_loop=form, adapt_parameters=adapted)
    batch = episodes(case)
    loss, _ = method(batch)
    loss.backward()
    check(loss, f"{prefix}meta_loss")
    for short, name in names.items():
        check(method.get_parameter(name).grad, f"{prefix}metagrad{order}_{short}")
    state = method.adapt(batch.support, batch.support_labels)
    logits = method.classify(state, batch.query)
    check(logits, f"{prefix}query_logits")
    summed = summed_cross_entropy(logits, batch.query_labels)
    divisor = labelled(batch.query_labels) if scaling == "mean" else int(case["in_shot"])
    check(summed / divisor, f"{prefix}query_loss_per_task")
    for short, name in names.items():
        if name in state:
            check(state[name], f"{prefix}adapted_{short}")


@pytest.mark.parametrize("form", ["loop", "vmap"])
def test_each_task_alone_in_evaluation(case, check, form):
    anil = "out_meta_loss" in case
    options = {"loss_scaling": "mean", "inner_loop": form, "inner_steps_eval": int(case["in_steps"])}
    method, _ = build(case, adapt_parameters="head" if anil else "all", **options)
    method.eval()
    batch = episodes(case)
    with torch.no_grad():
        logits = [
            method.classify(
                method.adapt(batch.support[t : t + 1], batch.support_labels[t : t + 1]), batch.query[t : t + 1]
            )
            for t in range(batch.tasks)
        ]
    check(torch.cat(logits), "out_query_logits" if anil else "out_mean_query_logits")
