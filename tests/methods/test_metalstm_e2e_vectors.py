from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.batch import Episodes
from pipeline.methods import meta_lstm
from pipeline.methods.meta_lstm import MetaLSTM

CASES = "metalstm_e2e_*.npz"


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


class Flat(nn.Flatten):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_features = features


@pytest.mark.parametrize("scale", ["plain", "div_n"])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("form", ["loop", "vmap"])
@pytest.mark.parametrize("graph", [True, False])
def test_end_to_end(case, check, scale, copies, form, graph, monkeypatch):
    """The case's episode several times at once, shuffled differently each time; with the graph kept and replayed."""
    way, steps = int(case["in_n_way"]), int(case["in_n_steps"])
    if not graph:
        monkeypatch.setattr(meta_lstm, "GRAPH", 0)
    features, hidden = case["in_support"].shape[1], case["in_lstm_whh"].shape[1]
    method = MetaLSTM(
        Flat(features), way, hidden, inner_steps=steps, inner_steps_eval=steps, gradient_scale=scale, inner_loop=form
    ).to(case["in_cI"].dtype)
    with torch.no_grad():
        for name, value in cell_of(case).items():
            method.get_parameter(name).copy_(value)
        weights, bias = case["in_cI"][:, 0].split([way * features, way])
        method.head.weight.copy_(weights.view(way, features))
        method.head.bias.copy_(bias)
    generator = torch.Generator().manual_seed(0)
    orders = {
        k: torch.stack([torch.randperm(len(case[f"in_{k}"]), generator=generator) for _ in range(copies)])
        for k in ("support", "query")
    }
    tensors = [(case[f"in_{k}"][o][..., None, None], case[f"in_{k}_labels"][o]) for k, o in orders.items()]
    batch = Episodes(*tensors[0], *tensors[1], torch.arange(way).expand(copies, way), way)

    name = f"out_{scale}"
    loss, _ = method(batch)
    loss.backward()
    check(loss, f"{name}_query_loss")
    gradients = {n: p.grad for n, p in method.named_parameters()}
    check_gradients(check, name, gradients)
    of_start = torch.cat([gradients["head.weight"].flatten(), gradients["head.bias"]])
    check(of_start.unsqueeze(-1), f"{name}_grad_cI")
    for training in (True, False):
        method.train(training)
        state = method.adapt(batch.support, batch.support_labels)
        for t in range(copies):
            end = torch.cat([state["head.weight"][t].flatten(), state["head.bias"][t]])
            check(end.unsqueeze(-1), f"{name}_theta_final")
    start = torch.cat([p.detach().flatten() for p in (method.head.weight, method.head.bias)]).expand(copies, -1)
    _, _, (found, losses) = method._update(start, batch.support, batch.support_labels, steps, remember=True)
    for t in range(copies):
        check(found[:, t], f"{name}_inner_grads")
        check(losses[:, t], f"{name}_inner_losses")
