"""An option that validation episodes choose: which one, when, and that a checkpoint keeps it."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.dataset import Dataset, class_table
from pipeline.evaluation.episodic import episode_accuracies
from pipeline.training.learner import Learner
from pipeline.training.loop import Hooks, train, validate
from pipeline.training.prepare import prepare
from pipeline.training.workers import Alone

OPTIONS = ["steps=0", "method.steps=3", "method.rate_episodes=4", "validation.episodes=6", "validation.way=5"]


@pytest.mark.parametrize("rates", [[0.0, 0.003, 0.03], [0.03, 0.0]])
def test_the_best_on_the_first_episodes(small_run, rates):
    config, _, run = prepare(small_run("pmf", *OPTIONS, f"method.rates={rates}"))
    learner, dataset = Learner(config, run.spec), Dataset(config.dataset_uri)
    saved: list[float] = []
    said: list[str] = []
    keep = Hooks(save=lambda it: saved.append(float(it.checkpoint({}, {}).model["rate"])), say=said.append)
    train(learner, [], dataset, per_step=1, hooks=keep)
    how, table, by_rate, by_all = config.validation, class_table(dataset.manifest, "val"), {}, {}
    for rate in rates:
        learner.method.settle(rate)
        accuracies = episode_accuracies(
            learner.method, learner.preprocess, dataset, table, how.spec(), how.seed, np.arange(6)
        )
        by_rate[rate], by_all[rate] = accuracies[:4].mean(), accuracies.mean()
    assert len(set(by_rate.values())) > 1
    assert saved == [next(rate for rate in rates if by_rate[rate] == max(by_rate.values()))]
    told = [f"pmf, candidate {rate:g}: {100 * by_rate[rate]:.1f} % of 4 validation episodes" for rate in rates]
    assert said[-len(rates) - 1 : -1] == told and said[-1] == f"pmf goes on with candidate {saved[0]:g}"
    assert learner.history[-1]["val/accuracy"] == pytest.approx(by_all[rates[0]])
    learner.method.settle(rates[1])
    validate(learner, dataset, Alone())
    assert float(learner.method.rate) == rates[0]


def test_others_have_none(small_run):
    config, _, run = prepare(small_run("prototypical"))
    assert Learner(config, run.spec).method.candidates == ()
