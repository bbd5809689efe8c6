from __future__ import annotations

import torch

from pipeline.training.optim import build_schedule

CASES = "schedules.npz"
STEPS = 1000  # an epoch


def test_learning_rate(case, check):
    """Epochs count from 1, and the code sets the rate at their start."""
    factors = build_schedule(
        {"name": "piecewise", "milestones": [19 * STEPS, 39 * STEPS, 49 * STEPS], "factors": [0.06, 0.012, 0.0024]},
        60 * STEPS,
    )
    first = [0.1 * factors((int(epoch) - 1) * STEPS) for epoch in case["in_metaopt_epochs"]]
    last = [0.1 * factors(int(epoch) * STEPS - 1) for epoch in case["in_metaopt_epochs"]]
    for rates in (first, last):
        check(torch.tensor(rates, dtype=case["out_metaopt_lr"].dtype), "out_metaopt_lr")
