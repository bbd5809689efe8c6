from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.methods.reptile import Reptile
from pipeline.nets.mlp import MLP
from pipeline.training.optim import build_schedule
from tests.vectors.cases import VECTORS

CASES = "reptile_[abc].npz"
NAMES = {"W1": "backbone.layers.0.weight", "b1": "backbone.layers.0.bias", "W2": "head.weight", "b2": "head.bias"}
VARIANTS = {
    "sgd_reptile": {"inner_optimizer": "sgd"},
    "sgd_foml": {"inner_optimizer": "sgd", "displacement": "last"},
    "adam_persistent_reptile": {"inner_optimizer": "adam", "moments": "persistent"},
    "adam_reset_reptile": {"inner_optimizer": "adam", "moments": "reset"},
}


@pytest.fixture
def case(request):
    path, dtype = request.param
    with np.load(path, allow_pickle=False) as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays if arrays[key].dtype.kind != "U"}
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}


def build(case, **options) -> Reptile:
    rate = float(case[f"in_inner_lr_{options['inner_optimizer']}"])
    hidden, inputs = case["in_W1"].shape
    backbone = MLP((inputs, 1, 1), widths=[hidden])
    method = Reptile(backbone, len(case["in_b2"]), inner_lr=rate, loss_reduction="mean", **options)
    method.to(case["in_W1"].dtype)
    with torch.no_grad():
        for short, name in NAMES.items():
            method.get_parameter(name).copy_(case[f"in_{short}"])
    return method


def minibatches(case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images, labels = case["in_batches_x"][..., None, None], case["in_batches_y"]  # [T, K, B, D, 1, 1], [T, K, B]
    return [(images[:, k], labels[:, k]) for k in range(labels.shape[1])]


@pytest.mark.parametrize("form", ["loop", "vmap"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_sgd_step_is_the_update(case, check, variant, form):
    method = build(case, inner_loop=form, **VARIANTS[variant])
    optimizer = torch.optim.SGD(method.parameters(), lr=float(case["in_meta_step"]))
    method.meta_loss(minibatches(case))[0].backward()
    optimizer.step()
    for short, name in NAMES.items():
        check(method.get_parameter(name).detach(), f"out_{variant}_new_{short}")


@pytest.mark.parametrize("variant", ["sgd", "adam_persistent"])
def test_where_every_task_leads(case, check, variant):
    """Each task alone, one after another: theta - gradient is where it went."""
    optimizer = variant.split("_")[0]
    method = build(case, inner_optimizer=optimizer)
    ends: dict[str, list[torch.Tensor]] = {short: [] for short in NAMES}
    for t in range(len(case["in_batches_y"])):
        method.zero_grad()
        method.meta_loss([(x[t : t + 1], y[t : t + 1]) for x, y in minibatches(case)])[0].backward()
        for short, name in NAMES.items():
            parameter = method.get_parameter(name)
            ends[short].append(parameter.detach() - parameter.grad)
    for short, found in ends.items():
        check(torch.stack(found), f"out_{variant}_task_params_{short}")


def test_linear_meta_step():
    with np.load(VECTORS / "schedules.npz") as arrays:
        schedule = build_schedule({"name": "linear", "final": 0.0}, int(arrays["in_reptile_total"]))
        found = [schedule(int(step)) for step in arrays["in_reptile_iters"]]
        np.testing.assert_allclose(found, arrays["out_reptile_meta_step_1_to_0"], rtol=0, atol=1e-12)
