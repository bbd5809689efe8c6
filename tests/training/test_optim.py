"""The backbone's learning rate beside that of the rest."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.model import build_model
from pipeline.training.optim import build_optimizer, check_optimizer, set_rate

SPEC = {"method": {"name": "simple_shot"}, "backbone": {"name": "mlp", "widths": [4]}, "classes": 5,
        "input": {"shape": [1, 4, 4], "scaling": "unit"}}  # fmt: skip


def test_the_backbone_has_its_own_rate():
    method = build_model(SPEC)
    optimizer = build_optimizer(method, {"name": "sgd", "lr": 1.0, "backbone_lr": 0.01})
    set_rate(optimizer, 0.5)
    before = {name: parameter.detach().clone() for name, parameter in method.named_parameters()}
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in method.named_parameters():
        rate = 0.005 if name.startswith("backbone.") else 0.5
        torch.testing.assert_close(before[name] - parameter.detach(), torch.full_like(parameter, rate), msg=name)


def test_without_one_the_groups_are_those_of_the_method():
    [group] = build_optimizer(build_model(SPEC), {"name": "sgd", "lr": 1.0, "backbone_lr": None}).param_groups
    assert group["base_lr"] == 1.0 and len(group["params"]) == 4


@pytest.mark.parametrize("rate", [-1, "fast", True, float("nan")])
def test_a_wrong_rate_is_refused(rate):
    with pytest.raises(PipelineError, match="optimizer.backbone_lr="):
        check_optimizer(build_model(SPEC), {"name": "adam", "lr": 1.0, "backbone_lr": rate})
