"""Runs on features: what they refuse, and that every head that looks at features alone trains on them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import compose, validate
from pipeline.data.batches import local_batches
from pipeline.data.dataset import Dataset, read_manifest
from pipeline.data.features import NETWORK, Network
from pipeline.data.shards import raw_table
from pipeline.data.write import write_shard
from pipeline.errors import PipelineError
from pipeline.evaluation.embed_dataset import _manifest
from pipeline.evaluation.seen import trained_classes
from pipeline.nets import build_backbone
from pipeline.training.checkpoint import save_checkpoint
from pipeline.training.embed import EmbedConfig, _network, embed
from pipeline.training.learner import Learner
from pipeline.training.loop import make_planner, train
from pipeline.training.prepare import prepare
from pipeline.training.runs import write_run
from pipeline.weights import origin_of

from .conftest import METHODS, SMALL

BACKBONE, INPUT = {"name": "conv4", "width": 8}, {"shape": [1, 28, 28], "scaling": "unit"}


@pytest.fixture(scope="module")
def features(glyphs, tmp_path_factory) -> str:
    """Random features in place of the glyphs: a class is a place with noise around it."""
    images = read_manifest(glyphs)
    network = Network(BACKBONE, INPUT, dict(build_backbone(BACKBONE, (1, 28, 28)).state_dict()))
    draw = np.random.default_rng(2)
    places = np.repeat(draw.normal(size=(len(images.class_names), 8)), images.class_counts, axis=0)
    values = (places + 0.1 * draw.normal(size=places.shape)).astype(np.float32)[..., None, None]
    folder = tmp_path_factory.mktemp("features") / "features"
    folder.mkdir()
    shard = write_shard(str(folder), raw_table(values))
    about = {**network.description, "dataset": {"name": images.name, "fingerprint": images.fingerprint}, "batch": 1}
    made = _manifest(images, "features", 8, about, {"kind": "features", "dataset": glyphs}, [shard], 0)
    (folder / NETWORK).write_bytes(network.content)
    (folder / "manifest.json").write_text(made.to_json())
    return str(folder)


def configured(features: str, tmp_path: Path, method: str, *overrides: str) -> dict:
    root, name = features.rsplit("/", 1)
    usual = [o for o in [*SMALL, *METHODS[method]] if not o.startswith(("backbone", "augmentation"))]
    place = ["data=features", f"data.root={root}", f"data.name={name}", f"storage={tmp_path}/runs", "backbone=features"]
    return compose("train", [*usual, *place, *overrides])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_heads_train_and_others_say_why_not(features, tmp_path, method):
    raw = configured(features, tmp_path, method)
    try:
        config, _, run = prepare(raw)
    except PipelineError as error:
        whys = ("needs images", "nothing to train", "cannot be taken apart", "backbone")
        assert any(why in str(error) for why in whys)
        return
    learner, dataset = Learner(config, run.spec), Dataset(features)
    planner = make_planner(config, dataset.manifest, learner.method)
    before = [parameter.clone() for parameter in learner.method.parameters()]
    train(learner, local_batches(dataset, planner, 0, config.steps), dataset, planner.per_step)
    assert learner.step == config.steps
    assert learner.metrics["val/accuracy"] > 0.5 or method == "snail"  # whose attention takes longer
    assert any(not torch.equal(a, b) for a, b in zip(before, learner.method.parameters(), strict=True))


@pytest.mark.parametrize(
    "method, overrides, message",
    [
        ("simple_shot", ["backbone=conv4"], "holds features: set backbone=features"),
        ("simple_shot", ["augmentation.flip=true"], "augmentation is of images"),
        ("simple_shot", ["input.scaling=standard"], "input.scaling=standard is of images"),
        ("simple_shot", ["data.name=none"], "no features at .*/none; make them with: python -m jobs.embed"),
        ("maml", [], "method=maml needs images"),
        ("prototypical", [], "method=prototypical has nothing to train on backbone=features: set steps=0"),
    ],
)
def test_what_only_images_can_go_through_is_refused(features, tmp_path, method, overrides, message):
    with pytest.raises(PipelineError, match=message):
        prepare(configured(features, tmp_path, method, *overrides))


def test_what_the_network_below_was_trained_on_is_told(features, tmp_path):
    manifest = read_manifest(features)
    begun = {**BACKBONE, "weights_sha256": "1" * 64, "trained_on": "birds"}
    folder = tmp_path / "features"
    shutil.copytree(features, folder)
    changed = replace(manifest, network={**manifest.network, "backbone": begun})
    (folder / "manifest.json").write_text(changed.to_json())
    said = "weights trained on birds, whose classes may be among those of the test"
    spec = {"backbone": {"name": "features"}}
    assert origin_of(spec, str(folder)) == said and origin_of(spec, features) is None
    assert origin_of(spec, str(tmp_path / "gone")) is None and origin_of({"backbone": begun}, None) == said


def test_classes_that_the_network_was_trained_on_are_not_tested_by(glyphs, features, tmp_path):
    """The features' source tells them, as it is told by the run whose network it is."""
    root, name = glyphs.rsplit("/", 1)
    place = [f"data.root={root}", f"data.name={name}", f"storage={tmp_path}/runs"]
    config, _, run = prepare(compose("train", [*SMALL, *place, "name=other", "train.split=test"]))
    learner = Learner(config, run.spec)
    write_run(run)
    save_checkpoint(f"{run.uri}/step_00000000", learner.checkpoint(run.config, run.dataset))
    manifest = read_manifest(glyphs)
    *_, trained = _network(validate(EmbedConfig, compose("embed", [*place, "run=other"])), manifest)
    assert trained == trained_classes(manifest, "test")
    folder = tmp_path / "features"
    shutil.copytree(features, folder)
    told = replace(read_manifest(features), source={"kind": "features", "dataset": glyphs, "trained": trained})
    (folder / "manifest.json").write_text(told.to_json())
    heads = [o for o in (*SMALL, "method=simple_shot", "backbone=features") if not o.startswith("backbone.")]
    at = [f"data.root={tmp_path}", f"storage={tmp_path}/runs", "data=features", "data.name=features"]
    given = [o for o in (*heads, *at) if o != "evaluation=null"]
    with pytest.raises(PipelineError, match="begins with was trained on 40 classes of split 'test' of dataset 'feat"):
        prepare(compose("train", given))
    assert prepare(compose("train", [*given, "evaluation=null"]))[2].dataset["trained"] == trained_classes(
        manifest, "train", trained
    )


def test_features_never_replace_images(glyphs, tmp_path):
    root, name = glyphs.rsplit("/", 1)
    given = [f"data.root={root}", f"data.name={name}", "backbone=conv4", f"name={name}", "overwrite=true"]
    with pytest.raises(PipelineError, match=f"name={name}: {glyphs} is a dataset of images, which features never"):
        embed(compose("embed", given))


def test_images_are_no_features(small_run):
    with pytest.raises(PipelineError, match="takes features, and not images of 1x28x28: make a dataset of them"):
        prepare(small_run("simple_shot", "backbone=features"))
