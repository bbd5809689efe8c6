"""The loop without Ray: what is resumed ends bit for bit as what was not interrupted."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.batches import local_batches
from pipeline.data.dataset import Dataset
from pipeline.errors import PipelineError
from pipeline.training import loop
from pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from pipeline.training.learner import Learner, make_deterministic
from pipeline.training.loop import Hooks, make_planner, should_stop, train
from pipeline.training.prepare import prepare

from .conftest import METHODS


def learn(raw: dict, start: str | None = None, stop_at: int | None = None, folder=None) -> Learner:
    """Train in this process, from a checkpoint, up to a step at which a checkpoint is written."""
    config, _, run = prepare(raw)
    make_deterministic(1, config.deterministic)
    learner, dataset = Learner(config, run.spec), Dataset(config.dataset_uri)
    if start:
        learner.restore(load_checkpoint(start))
    planner = make_planner(config, dataset.manifest, learner.method)
    end = stop_at or config.steps
    stream = local_batches(dataset, planner, learner.step, end - learner.step)

    def save(learner: Learner) -> None:
        if folder and learner.step == stop_at:
            save_checkpoint(folder, learner.checkpoint(run.config, run.dataset))

    train(learner, stream, dataset, planner.per_step, hooks=Hooks(save=save))
    return learner


def assert_same(a: Learner, b: Learner) -> None:
    assert a.step == b.step
    for (name, x), (_, y) in zip(a.method.state_dict().items(), b.method.state_dict().items(), strict=True):
        assert torch.equal(x, y), name
    for kind in a.optimizers:
        first, second = (run.optimizers[kind].state_dict()["state"] for run in (a, b))
        assert first.keys() == second.keys()
        for number in first:
            for key, value in first[number].items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[number][key])), (kind, number, key)


@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted(small_run, tmp_path, method):
    whole = learn(small_run(method))
    learn(small_run(method), stop_at=8, folder=tmp_path / "checkpoint")
    resumed = learn(small_run(method), start=str(tmp_path / "checkpoint"))
    assert_same(whole, resumed)
    accuracies = [[e["val/accuracy"] for e in run.history if "val/accuracy" in e] for run in (whole, resumed)]
    assert accuracies[0] == accuracies[1] and len(accuracies[0]) == 2


STEPS = {"snail": 240, "conditionally_shifted": 160}  # of methods that begin slowly; others 80
UNBOUNDED = {"matching": ["method.distance=squared_euclidean"]}  # cosines keep its loss above 0.9, whatever is learnt
QUICK = ("prototypical", "maml", "imprinted")  # one of each regime


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in METHODS])
def test_training_learns(small_run, method):
    """Far better than untrained after a minute's worth of steps on a small net."""
    steps = STEPS.get(method, 80)
    extra = [f"steps={steps}", f"validation.every={steps}", "validation.episodes=60", "checkpoint.every=1000"]
    extra += ["backbone.width=16", *UNBOUNDED.get(method, [])]
    rate = "optimizer.lr=3e-3"
    run = learn(small_run(method, *extra, rate, "augmentation.crop_padding=0", "augmentation.flip=false"))
    losses = [e["train/loss"] for e in run.history if "train/loss" in e]
    assert losses[-1] < 0.8 * losses[0]


def test_a_damaged_checkpoint_is_refused_by_name(small_run, tmp_path):
    learn(small_run("prototypical"), stop_at=4, folder=tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(PipelineError, match=r"model\.safetensors does not have the SHA-256"):
        load_checkpoint(str(tmp_path / "c"))
    (tmp_path / "c" / "state.json").write_text("{")
    with pytest.raises(PipelineError, match="is not a checkpoint"):
        load_checkpoint(str(tmp_path / "c"))


def test_a_loss_that_is_not_finite_stops_the_run(small_run):
    told = r"loss is NaN or infinite in step \d+, with episodes .* lower optimizer\.lr"
    with pytest.raises(PipelineError, match=told):
        learn(small_run("prototypical", "optimizer.lr=1e30"))


def test_patience():
    def history(*accuracies):
        return [{"step": i, "val/accuracy": a} for i, a in enumerate(accuracies)]

    assert not should_stop(history(0.5, 0.4, 0.3), None)
    assert not should_stop(history(0.5, 0.6, 0.7), 2)
    assert not should_stop(history(0.5, 0.4), 2)
    assert should_stop(history(0.5, 0.4, 0.5), 2)
    assert not should_stop(history(0.5, 0.4, 0.51), 2)


@pytest.mark.parametrize(("lr", "lines"), [("0.0", 1), ("0.01", 0)])
def test_a_run_that_answers_by_guessing_says_so_once(small_run, monkeypatch, lr, lines):
    monkeypatch.setattr(loop, "SETTLED", 8)
    said: list[str] = []
    options = ("steps=24", "log_every=8", "validation.every=24", "checkpoint.every=24")
    config, _, run = prepare(small_run("prototypical", *options, f"optimizer.lr={lr}"))
    learner, dataset = Learner(config, run.spec), Dataset(config.dataset_uri)
    learner.begin(run)
    if lines:  # a network that tells nothing from anything
        for weight in learner.method.backbone.parameters():
            torch.nn.init.zeros_(weight)
    planner = make_planner(config, dataset.manifest, learner.method)
    batches = local_batches(dataset, planner, 0, 24)
    train(learner, batches, dataset, planner.per_step, hooks=Hooks(say=said.append))
    assert len(said) == lines and all("after 8 steps the training accuracy is" in line for line in said)


@pytest.mark.parametrize(("scale", "lines"), [(1.0, 0), (1000.0, 1)])
def test_a_run_that_begins_with_other_weights_says_where_its_logits_are_saturated(small_run, tmp_path, scale, lines):
    start, said = tmp_path / "checkpoint", []
    learn(small_run("prototypical"), stop_at=8, folder=start)
    config, _, run = prepare(small_run("prototypical", f"initial={start}", f"method.scale={scale}", "steps=2"))
    learner, dataset = Learner(config, run.spec), Dataset(config.dataset_uri)
    learner.begin(run)
    planner = make_planner(config, dataset.manifest, learner.method)
    batches = local_batches(dataset, planner, 0, 2)
    train(learner, batches, dataset, planner.per_step, hooks=Hooks(say=said.append))
    assert learner.method.scale == scale  # the configuration's, not the checkpoint's
    assert len(said) == lines and all("method.scale=1000.0 saturates the logits" in line for line in said)


@pytest.mark.parametrize("method", ["maml", "reptile", "meta_lstm"])
def test_a_head_that_did_not_come_with_the_weights_begins_at_zero(small_run, tmp_path, method):
    def begun(*initial: str) -> Learner:
        config, _, run = prepare(small_run(method, *initial, *network))
        learner = Learner(config, run.spec)
        learner.begin(run)
        return learner

    network = ["backbone=conv4_strided", "backbone.width=8"]
    learn(small_run("prototypical", *network), stop_at=8, folder=tmp_path / "others")
    assert begun().method.head.weight.count_nonzero() > 0  # type: ignore[union-attr]
    first = begun(f"initial={tmp_path}/others")
    assert not first.method.head.weight.any() and not first.method.head.bias.any()  # type: ignore[union-attr]
    learn(small_run(method, *network), stop_at=8, folder=tmp_path / "own")
    assert begun(f"initial={tmp_path}/own").method.head.weight.count_nonzero() > 0  # type: ignore[union-attr]
