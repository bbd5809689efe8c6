"""A NaN or infinite loss: told with its episodes, found again by a replay; nothing of it is kept."""

from __future__ import annotations

import json

import pytest
import torch

from pipeline import store
from pipeline.data.batches import local_batches
from pipeline.data.dataset import Dataset
from pipeline.errors import Diverged, PipelineError
from pipeline.model import build_preprocess
from pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from pipeline.training.learner import Learner, make_deterministic
from pipeline.training.loop import Hooks, make_planner, train
from pipeline.training.prepare import prepare
from pipeline.training.replay import Replayed, Shares, replay, replay_job
from pipeline.training.runs import checkpoints
from tests.cluster.recorded import digests

RECORDED = "method.name=tests.cluster.recorded.Recorded"


@pytest.fixture
def poisoned(small_run):
    """Configuration of a run of 12 steps, one of whose episodes, number 26 of step 7, gives NaN."""
    raw = small_run("prototypical", "name=poisoned", RECORDED, "cluster.workers=1")
    config, _, run = prepare(raw)
    dataset, preprocess = Dataset(config.dataset_uri), build_preprocess(run.spec)
    planner = make_planner(config, dataset.manifest, Learner(config, run.spec).method)
    ((_, batch),) = local_batches(dataset, planner, 6, 1)
    prepared = type(batch)(**{**vars(batch), "support": preprocess(batch.support), "query": preprocess(batch.query)})
    return {**raw, "method": {**raw["method"], "poison": digests(prepared)[2]}}


def run_here(raw: dict) -> tuple[object, object]:
    """Train without Ray, with checkpoints in the run's folder."""
    config, raw, run = prepare(raw)
    record = {key: getattr(run, key) for key in ("name", "config", "spec", "dataset", "arguments")}
    store.write_bytes(f"{run.uri}/run.json", json.dumps(record).encode())
    make_deterministic(1, True)
    learner, dataset = Learner(config, run.spec), Dataset(config.dataset_uri)
    planner = make_planner(config, dataset.manifest, learner.method)

    def save(learner: Learner) -> None:
        save_checkpoint(f"{run.uri}/step_{learner.step:08d}", learner.checkpoint(run.config, run.dataset))

    stream = local_batches(dataset, planner, 0, config.steps)
    try:
        train(learner, stream, dataset, planner.per_step, hooks=Hooks(save=save))
    except Diverged as error:
        return run, error
    return run, learner


def test_the_episodes_of_the_step_are_told_and_the_one_is_found(poisoned, capsys):
    run, error = run_here(poisoned)
    assert "the loss is NaN or infinite in step 7, with episodes 24..27" in str(error) and "\n" not in str(error)
    assert f"python -m jobs.replay run={run.uri} step=7" in str(error)
    kept = [load_checkpoint(uri) for uri in checkpoints(run.uri)]
    assert [checkpoint.step for checkpoint in kept] == [4, 6]
    assert all(torch.isfinite(value).all() for checkpoint in kept for value in checkpoint.model.values())
    found = replay_job({"run": run.name, "storage": poisoned["storage"], "step": 7})
    assert found["not_finite"] == [26] and found["from"] == 6
    assert "episode 26 is made of rows" in capsys.readouterr().out


def test_weights_that_broke_are_not_saved(small_run):
    """With so large a step the first loss is finite and the weights after it are not."""
    _, error = run_here(small_run("prototypical", "name=broken", "optimizer=sgd", "optimizer.lr=1e38",
                                  "cluster.workers=1", "checkpoint.every=1"))  # fmt: skip
    assert "the weights are NaN or infinite" in str(error) and "step 1, with episodes 0..3" in str(error)


@pytest.mark.parametrize("method", ["prototypical", "maml", "tadam"])
def test_a_replay_takes_the_steps_that_the_run_took(small_run, method):
    """From the beginning, with one worker: bit for bit."""
    raw = small_run(method, f"name=whole-{method}", "cluster.workers=1", "augmentation.flip=true")
    run, learner = run_here(raw)
    config, _, _ = prepare({**raw, "name": "again"})
    again, dataset = Replayed(config, run.spec), Dataset(config.dataset_uri)
    again.module = Shares(again)
    planner = make_planner(config, dataset.manifest, again.method)
    for _, batch in local_batches(dataset, planner, 0, config.steps):
        again.train_step([batch])
    for (name, a), (_, b) in zip(learner.method.state_dict().items(), again.method.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    looked, began = replay(run, 12)
    assert began == 8 and all(one.finite for one in looked)


def test_a_replay_begins_as_the_run_began(small_run):
    """With the weights of another run, where no checkpoint was written yet. Without batch-norm, for which an episode
    alone is another batch."""
    plain = ["backbone=mlp", "cluster.workers=1"]
    first, _ = run_here(small_run("prototypical", "name=first", *plain))
    raw = small_run("prototypical", "name=second", f"initial={first.uri}", *plain)
    config, _, run = prepare(raw)
    learner, dataset = Learner(config, run.spec), Dataset(config.dataset_uri)
    learner.begin(run)
    ((_, batch),) = local_batches(dataset, make_planner(config, dataset.manifest, learner.method), 0, 1)
    loss = float(learner.train_step(batch)["loss"])
    run, _ = run_here(raw)
    for checkpoint in checkpoints(run.uri):
        store.remove(checkpoint)
    looked, began = replay(run, 1)
    assert began == 0
    assert sum(one.loss for one in looked) / len(looked) == pytest.approx(loss, rel=1e-5)


def test_an_episode_is_looked_at_as_the_step_saw_it(small_run):
    """By the augmentation that the worker drew for its whole share, and in the run's precision."""
    drawn = ["augmentation.flip=true", "augmentation.affine=1", "augmentation.crop_padding=4"]
    raw = small_run("prototypical", "name=half", "backbone=mlp", "cluster.workers=1", "steps=1", *drawn)
    for precision in ("float32", "bfloat16"):
        run, learner = run_here({**raw, "name": precision, "precision": precision})
        for checkpoint in checkpoints(run.uri):
            store.remove(checkpoint)
        looked, _ = replay(run, 1)
        assert sum(one.loss for one in looked) / len(looked) == pytest.approx(learner.metrics["train/loss"], rel=1e-5)


def test_a_step_that_the_run_does_not_have_is_refused(small_run):
    run, _ = run_here(small_run("prototypical", "name=short", "cluster.workers=1"))
    with pytest.raises(PipelineError, match="step=13: run short has 12 steps"):
        replay(run, 13)
