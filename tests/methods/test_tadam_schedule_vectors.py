"""TADAM's learning rate and its co-training probability over a run."""

from __future__ import annotations

import torch

from pipeline.config import compose
from pipeline.methods.tadam import co_training_probability
from pipeline.training.optim import build_schedule

CASES = "schedules.npz"


def test_learning_rate_of_the_recipes(case, check):
    for recipe in ("mini_imagenet_tadam", "fc100_tadam"):
        config = compose("train", [f"recipe={recipe}"])
        assert config["steps"] == int(case["in_tadam_T"])
        schedule = build_schedule(config["schedule"], config["steps"])
        rates = [config["optimizer"]["lr"] * schedule(int(step)) for step in case["in_tadam_steps"]]
        check(torch.tensor(rates, dtype=case["out_tadam_lr"].dtype), "out_tadam_lr")


def test_co_training_probability(case, check):
    steps = int(case["in_tadam_T"])
    for key, start in (("code", 0.9), ("paper", 1.0)):
        found = [co_training_probability(int(step), steps, start) for step in case["in_tadam_steps"]]
        check(torch.tensor(found, dtype=case["out_tadam_lr"].dtype), f"out_tadam_aux_prob_{key}")
