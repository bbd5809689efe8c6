from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.functional.meta_lstm import CellWeights, cell_step, first_state, preprocess, replayed, unroll
from tests.vectors.cases import VECTORS

CASES = "metalstm_cell_*.npz"


def cell_of(case) -> dict[str, torch.Tensor]:
    """Weights in this project's form; the vectors have two biases of the LSTM, which add up."""
    return {
        "cell_inputs": case["in_lstm_wih"],
        "cell_hidden": case["in_lstm_whh"],
        "cell_bias": case["in_lstm_bih"] + case["in_lstm_bhh"],
        "gate_weight": torch.stack([case["in_WF"][:, 0], case["in_WI"][:, 0]]),
        "gate_bias": torch.cat([case["in_bF"][0], case["in_bI"][0]]),
    }


def check_gradients(check, prefix: str, found: dict[str, torch.Tensor]) -> None:
    check(found["cell_inputs"], f"{prefix}_grad_lstm_wih")
    check(found["cell_hidden"], f"{prefix}_grad_lstm_whh")
    check(found["cell_bias"], f"{prefix}_grad_lstm_bih")
    check(found["cell_bias"], f"{prefix}_grad_lstm_bhh")
    for row, name in enumerate("FI"):
        check(found["gate_weight"][row].unsqueeze(1), f"{prefix}_grad_W{name}")
        check(found["gate_bias"][row].view(1, 1), f"{prefix}_grad_b{name}")


@pytest.mark.parametrize("variant", ["presig", "postsig"])
@pytest.mark.parametrize("learners", [1, 3])
def test_cell(case, check, variant, learners):
    """All coordinates of several learners at once: the case's, between others."""
    leaves = {name: value.clone().requires_grad_() for name, value in cell_of(case).items()}
    weights, pre = CellWeights(*leaves.values()), variant == "presig"
    place = learners // 2
    start = torch.randn(learners, len(case["in_cI"]), dtype=case["in_cI"].dtype)
    gradients = torch.randn(*case["in_losses"].shape, *start.shape, dtype=start.dtype)
    losses = torch.rand(len(gradients), learners, dtype=start.dtype)
    start[place], gradients[:, place], losses[:, place] = case["in_cI"][:, 0], case["in_grads"], case["in_losses"]
    start.requires_grad_()
    state, states = first_state(start, leaves["cell_hidden"].shape[1]), []
    for gradient, loss in zip(gradients, losses, strict=True):
        state = cell_step(weights, state, gradient, loss, float(case["meta_p"]), pre)
        states.append(state)
    name = f"out_{variant}"
    check(torch.stack([s.theta[place].unsqueeze(-1) for s in states]), f"{name}_theta")
    check(torch.stack([s.hidden[:, place].T for s in states]), f"{name}_h")
    check(torch.stack([s.cell[:, place].T for s in states]), f"{name}_c")
    check(torch.stack([s.gates[0, place].unsqueeze(-1) for s in states]), f"{name}_f_pre")
    check(torch.stack([s.gates[1, place].unsqueeze(-1) for s in states]), f"{name}_i_pre")
    options = (float(case["meta_p"]), pre)
    with torch.no_grad():
        end = unroll(weights, start, gradients, losses, *options)
    for theta in (state.theta, replayed(end, weights, start, gradients, losses, *options)):
        objective = 0.5 * (theta[place].unsqueeze(-1) - case["in_target"]).square().sum()
        check(objective, f"{name}_J")
        found = torch.autograd.grad(objective, [*leaves.values(), start])
        check_gradients(check, name, dict(zip(leaves, found, strict=False)))
        check(found[-1][place].unsqueeze(-1), f"{name}_grad_cI")
        assert (found[-1].abs().sum(1) > 0).tolist() == [i == place for i in range(learners)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_preprocessing(dtype, tolerance):
    with np.load(VECTORS / "metalstm_preprocess.npz") as arrays:
        x, expected = (torch.from_numpy(arrays[key]).to(dtype) for key in ("in_x", "out_z"))
        torch.testing.assert_close(preprocess(x, float(arrays["in_p"])), expected, rtol=0, atol=tolerance)
