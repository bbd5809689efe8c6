"""``steps=0``: a network is measured and kept as it begins."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.dataset import Dataset
from pipeline.model import build_model
from pipeline.training.launch import prepare
from pipeline.training.learner import Learner, seed_everything
from pipeline.training.loop import Hooks, train


@pytest.mark.parametrize("method", ["prototypical", "simple_shot", "maml"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_no_steps(small_run, method: str, schedule: str) -> None:
    config, _, run = prepare(small_run(method, "steps=0", f"schedule={schedule}", "seed=5"))
    learner, saved = Learner(config, run.spec), []
    save = lambda learner: saved.append((learner.step, dict(learner.metrics), dict(learner.method.state_dict())))  # noqa: E731
    train(learner, iter(()), Dataset(config.dataset_uri), 4, hooks=Hooks(save=save))
    [(step, metrics, weights)] = saved
    assert step == 0 and 0 < metrics["val/accuracy"] < 1
    seed_everything("weights", 5)
    first = build_model(run.spec).state_dict()
    changed = {name for name, tensor in first.items() if not torch.equal(tensor, weights[name])}
    assert changed == ({"mean"} if method == "simple_shot" else set()), "a summary of the training images, no weights"
