"""``steps=0``: a network is measured and kept as it begins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.config import compose
from pipeline.data.dataset import ClassTable, Dataset, class_table
from pipeline.data.seeds import seed_everything
from pipeline.errors import PipelineError
from pipeline.evaluation import spread
from pipeline.evaluation.embedded import Embeddings
from pipeline.evaluation.model import Built, Model
from pipeline.model import build_model
from pipeline.training import loop
from pipeline.training.checkpoint import Checkpoint, load_checkpoint, name_of, save_checkpoint
from pipeline.training.launch import launch
from pipeline.training.learner import Learner
from pipeline.training.loop import Hooks, train, validate
from pipeline.training.prepare import prepare
from pipeline.training.runs import checkpoints
from pipeline.training.workers import Alone
from pipeline.workflow import _surveyed, _untrained


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


def test_what_was_measured_and_kept_is_not_kept_again(small_run, tmp_path) -> None:
    """A run that is gone on with, for its evaluation or registration, has the one checkpoint that it had."""
    config, _, run = prepare(small_run("simple_shot", "steps=0"))
    dataset, learners, saves = Dataset(config.dataset_uri), [], []

    def save(learner: Learner) -> None:
        save_checkpoint(tmp_path / "kept", learner.checkpoint(run.config, run.dataset))
        saves.append(learner.step)

    for _ in range(3):
        learners.append(Learner(config, run.spec))
        if saves:
            learners[-1].restore(load_checkpoint(str(tmp_path / "kept")))
        train(learners[-1], iter(()), dataset, 4, hooks=Hooks(save=save))
    assert saves == [0] and learners[0].history == learners[2].history
    first, last = (learner.method.state_dict() for learner in (learners[0], learners[2]))
    assert all(torch.equal(first[name], last[name]) for name in first)


@pytest.mark.slow
def test_it_is_gone_on_with_again_and_again_under_ray_train(ray_session, small_run) -> None:
    config, _, run = prepare(small_run("prototypical", "steps=0", "name=kept", "checkpoint.keep=1"))
    for _ in range(4):
        launch(config, run)
        assert [name_of(uri) for uri in checkpoints(run.uri)] == ["step_00000000"]


def test_what_is_measured_as_untrained_is_what_the_run_began_with(small_run) -> None:
    config, _, run = prepare(small_run("prototypical", "seed=5"))
    begun = Learner(config, run.spec).method.state_dict()
    trained = Model(run.spec, {name: tensor + 1 for name, tensor in begun.items()}, "run")
    for method, _ in (_untrained(trained, run).build(), Model(run.spec, None).build(seed=5)):
        assert all(torch.equal(tensor, begun[name]) for name, tensor in method.state_dict().items())


def test_what_a_method_keeps_of_the_training_images_is_untrained_too(small_run, monkeypatch) -> None:
    """Without Ray, which spreads the same embedding over tasks."""

    class Here(spread.EmbeddedSplits):
        def __init__(self, model: Model, gpus: float) -> None:
            self.built = Built(*model.build(), torch.device("cpu"))

        def few(self, dataset: str, table: ClassTable) -> Embeddings:
            whole = range(int(table.counts.sum()))
            return Embeddings(spread._embed(self.built, whole, dataset, (1, 28, 28), table), table)

    monkeypatch.setattr(spread, "EmbeddedSplits", Here)
    config, _, run = prepare(small_run("simple_shot", "steps=0", "train.holdout=0.2"))
    learner, dataset = Learner(config, run.spec), Dataset(config.dataset_uri)
    loop.survey(learner, dataset, Alone())
    model = Model(run.spec, dict(learner.method.state_dict()), "run", config.dataset_uri)
    found = _surveyed(_untrained(model, run), run, 0.0)
    assert found.weights["mean"].abs().max() > 0
    assert all(torch.equal(tensor, found.weights[name]) for name, tensor in model.weights.items())


def test_a_run_that_begins_with_another_s_weights_was_never_untrained(small_run, tmp_path) -> None:
    config, _, first = prepare(small_run("prototypical"))
    weights = dict(Learner(config, first.spec).method.state_dict())
    save_checkpoint(tmp_path / "begun", Checkpoint(0, first.spec, first.config, first.dataset, {}, [], weights))
    later = ["evaluation.untrained=true", f"initial={tmp_path}/begun"]
    raw = {**small_run("prototypical", *later[1:]), "evaluation": compose("train", later[:1])["evaluation"]}
    with pytest.raises(PipelineError, match="evaluation.untrained: this run begins with the weights of .*begun"):
        prepare(raw)
    run = prepare(small_run("prototypical", *later[1:]))[2]
    with pytest.raises(PipelineError, match="untrained: .* began with the weights of initial=.*begun; measure them"):
        _untrained(Model(run.spec, weights, "run"), run)


def test_a_registered_model_s_first_weights_are_not_known_and_that_is_said(small_run, capsys) -> None:
    spec = prepare(small_run("prototypical"))[2].spec
    _untrained(Model(spec, None, "models:/one/1"), None)
    assert "note: models:/one/1 does not tell the seed of its run" in capsys.readouterr().out


def test_episodes_that_nobody_draws_need_no_images(small_run) -> None:
    """A network that trains on nothing is measured on a dataset whose classes are too small for training episodes."""
    with pytest.raises(PipelineError, match=r"train.shot \+ train.query = 1 \+ 500"):
        prepare(small_run("prototypical", "steps=1", "train.query=500"))
    prepare(small_run("prototypical", "steps=0", "train.query=500"))


@pytest.mark.parametrize("steps", [0, 40])
def test_no_validation_image_is_embedded_twice(small_run, monkeypatch, steps: int) -> None:
    """Where episodes hold more images than their split: once a round, and once for all where the network stays as it
    is; the accuracy is the same."""
    long = [f"steps={steps}", "validation.episodes=200"]
    config, _, run = prepare(small_run("prototypical", *long))
    dataset, learner = Dataset(config.dataset_uri), Learner(config, run.spec)
    seen: list[int] = []
    learner.method.backbone.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    accuracy = validate(learner, dataset, Alone())
    images = int(class_table(dataset.manifest, "val").counts.sum())
    assert images <= sum(seen) < 2 * images
    assert validate(learner, dataset, Alone()) == accuracy and sum(seen) < (2 + 2 * (steps > 0)) * images
    with torch.no_grad():
        learner.method.backbone.convs[0].weight.neg_()  # type: ignore[union-attr]
    assert steps == 0 or validate(learner, dataset, Alone()) != accuracy, "by the weights of its time"
    with torch.no_grad():
        learner.method.backbone.convs[0].weight.neg_()  # type: ignore[union-attr]
    monkeypatch.setattr(loop, "possible", lambda *given: False)
    assert abs(validate(learner, dataset, Alone()).mean - accuracy.mean) < 1e-3


class Averaging(nn.Module):
    """No parameter, but what it makes of an image changes with all those that it has seen in training."""

    out_features = 28

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(28))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = images.mean((1, 2))
        if self.training:
            self.mean += found.mean(0)
        return found - self.mean


@pytest.mark.parametrize(
    ("kind", "stays"),
    [("frozen", True), ("trained", False), ("without parameters", False), ("averages of batch-norm move", False)],
)
def test_only_a_frozen_network_is_taken_to_stay_as_it_is(small_run, kind: str, stays: bool) -> None:
    network = [] if kind == "averages of batch-norm move" else ["backbone=mlp", "backbone.widths=[4]"]
    config, _, run = prepare(small_run("prototypical", "validation.episodes=200", *network))
    dataset, learner = Dataset(config.dataset_uri), Learner(config, run.spec)
    if kind in ("frozen", "averages of batch-norm move"):
        learner.method.backbone.requires_grad_(False)
    if kind == "without parameters":
        learner.method.backbone = Averaging()
    validate(learner, dataset, Alone())
    assert (learner.embeddings is not None) == stays
