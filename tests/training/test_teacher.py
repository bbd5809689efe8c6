"""A run that is taught by another: where the teacher comes from, what it changes, and who cannot teach."""

from __future__ import annotations

import copy

import pytest
import torch

from pipeline.config import compose, validate
from pipeline.data.batches import to_batch
from pipeline.data.dataset import Dataset
from pipeline.errors import PipelineError
from pipeline.evaluation.seen import trained_classes
from pipeline.model import build_model
from pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from pipeline.training.config import TrainConfig
from pipeline.training.learner import Learner
from pipeline.training.loop import make_planner
from pipeline.training.prepare import prepare
from pipeline.training.runs import write_run


@pytest.fixture
def taught(small_run, tmp_path):
    """The raw configuration of a run whose teacher is the run "first", and the learner that this is the run of."""
    config, raw, run = prepare(small_run("rfs", "name=first"))
    learner = Learner(config, run.spec)
    write_run(run)
    save_checkpoint(f"{run.uri}/step_00000000", learner.checkpoint(raw, run.dataset))
    return small_run("rfs", "name=second", "seed=4", "method.teacher=first"), learner


def test_goes_by_the_teacher(taught):
    raw, first = taught
    config, stored, run = prepare(raw)
    assert stored["method"]["teacher"] == f"{run.uri.removesuffix('second')}first/step_00000000"
    learner, alone = Learner(config, run.spec), Learner(config, {**run.spec, "method": {"name": "rfs"}})
    teacher = learner.method._teacher[0]
    assert all(torch.equal(v, first.method.state_dict()[k]) for k, v in teacher.state_dict().items())
    assert set(learner.method.state_dict()) == set(alone.method.state_dict())
    dataset = Dataset(config.dataset_uri)
    planner = make_planner(config, dataset.manifest, learner.method)
    plan = planner.plan(0)
    batch = to_batch(plan, torch.from_numpy(dataset.gather(plan.rows)), dataset.manifest.rotations)
    figures, without = learner.train_step(batch), alone.train_step(batch)
    expected = 0.5 * without["loss"] + 0.5 * figures["divergence"]
    torch.testing.assert_close(figures["loss"], expected)
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())


def test_the_trained_model_needs_no_teacher(taught):
    config, _, run = prepare(taught[0])
    spec = copy.deepcopy(run.spec)
    spec["method"]["teacher"] = "/nowhere"
    build_model(spec).load_state_dict(Learner(config, run.spec).method.state_dict())


def test_who_cannot_teach(taught, small_run):
    raw, _ = taught
    where = prepare(raw)[1]["method"]["teacher"]
    for changed, message in (
        ({"input": {**load_checkpoint(where).spec["input"], "scaling": "none"}}, "prepared otherwise"),
        ({"classes": 3}, "on 3 classes"),
    ):
        checkpoint = load_checkpoint(where)
        checkpoint.spec |= changed
        save_checkpoint(where + "x", checkpoint)
        with pytest.raises(PipelineError, match=message):
            prepare(small_run("rfs", "name=third", f"method.teacher={where}x"))
    checkpoint = load_checkpoint(where)
    checkpoint.dataset |= {"split": "val"}  # with as many classes, perhaps
    save_checkpoint(where + "x", checkpoint)
    with pytest.raises(PipelineError, match="on split 'val', not on 'train'"):
        prepare(small_run("rfs", "name=third", f"method.teacher={where}x"))
    checkpoint = load_checkpoint(where)
    checkpoint.dataset |= {"fingerprint": "another", "name": "faces"}
    save_checkpoint(where + "x", checkpoint)
    with pytest.raises(PipelineError, match="another dataset, 'faces'"):
        prepare(small_run("rfs", "name=third", f"method.teacher={where}x"))
    with pytest.raises(PipelineError, match="method.teacher=nobody: neither a checkpoint"):
        prepare(small_run("rfs", "name=third", "method.teacher=nobody"))


def test_what_the_teacher_saw_the_pupil_knows(taught, small_run):
    """Test classes among those that the teacher's first weights were trained on."""
    where = prepare(taught[0])[1]["method"]["teacher"]
    checkpoint = load_checkpoint(where)
    manifest = Dataset(checkpoint.dataset["uri"]).manifest
    checkpoint.dataset["trained"] = trained_classes(manifest, "train+test")
    save_checkpoint(where + "x", checkpoint)
    raw = small_run("rfs", "name=third", f"method.teacher={where}x")
    assert prepare(raw)[2].dataset["trained"] == checkpoint.dataset["trained"]
    raw["evaluation"] = compose("train")["evaluation"]
    with pytest.raises(PipelineError, match="begins with or is taught by was trained on .* of split 'test'"):
        prepare(raw)


def test_teacher_is_a_path_of_the_configuration(small_run):
    assert validate(TrainConfig, small_run("rfs", "method.teacher=~/first")).method["teacher"].startswith("/")
