"""Features of a dataset: what the network makes of every image, the same bytes however they came about, and what is
trained and measured on them is the same as on the images."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from pipeline.config import compose
from pipeline.data.augment import Augmentation, augment, step_generator
from pipeline.data.batches import local_batches
from pipeline.data.dataset import Dataset, class_table, read_manifest, whole_table
from pipeline.data.episodes import EpisodeSpec
from pipeline.data.features import NETWORK, Network, Pictures, read_network
from pipeline.data.planners import EpisodePlanner, ImagePlanner, Views
from pipeline.data.shards import map_shard
from pipeline.data.write import Target, write_dataset
from pipeline.errors import PipelineError, Unavailable
from pipeline.evaluation.embed_dataset import Embedder, Embedding, embed_dataset
from pipeline.evaluation.embedded import embed_part
from pipeline.evaluation.evaluate import EpisodicProtocol, evaluate
from pipeline.evaluation.model import Model
from pipeline.inference import FewShotClassifier
from pipeline.model import build_model, build_preprocess
from pipeline.nets import build_backbone, own_code
from pipeline.retraining.run import images_of
from pipeline.search.arguments import translate
from pipeline.search.campaign import begin
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.models import model_for, model_of, whole_checkpoint
from pipeline.weights import described, settle

BACKBONE = {"name": "conv4", "width": 8}
INPUT = {"shape": [1, 28, 28], "scaling": "unit"}


@pytest.fixture(scope="module")
def turned(tmp_path_factory) -> str:
    """Twelve classes of 25 noisy images, each a class of its own when it is turned."""
    uri = str(tmp_path_factory.mktemp("turned") / "turned")
    draw = np.random.default_rng(0)
    classes = [(f"c{n}", draw.integers(0, 256, (25, 1, 28, 28), dtype=np.uint8)) for n in range(12)]
    names = [name for name, _ in classes]
    splits = {"train": names[6:], "val": names[3:6], "test": names[:3]}
    write_dataset(uri, "turned", classes, splits, rotations=[0, 90], shard_bytes=100 * 784)
    return uri


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(3)
    return Network(BACKBONE, INPUT, dict(build_backbone(BACKBONE, (1, 28, 28)).state_dict()))


def embedded(uri: str, where: Path, network: Network, **options) -> str:
    how = replace(Embedding.of(uri, network, None, 2**20, False), **options)
    target = Target(str(where), resume=True)
    embed_dataset(how, target, "features", {"kind": "features", "dataset": uri}, say=lambda line: None)
    return str(where)


@pytest.fixture(scope="module")
def features(ray_session, turned, network, tmp_path_factory) -> str:
    return embedded(turned, tmp_path_factory.mktemp("features") / "features", network)


def content(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_every_row_is_what_the_network_makes_of_its_image(turned, features, network):
    images, found = Dataset(turned), Dataset(features)
    method = build_backbone(BACKBONE, (1, 28, 28))
    method.load_state_dict(network.weights)
    for split in ("train", "val", "test"):
        of_images, of_features = (class_table(dataset.manifest, split) for dataset in (images, found))
        np.testing.assert_array_equal(of_images.ids, of_features.ids)
        for place, number in enumerate(of_images.ids.tolist()):
            count = int(of_images.counts[place])
            pixels = images.gather(of_images.starts[place] + np.arange(count))
            pixels = np.rot90(pixels, number % 2, axes=(2, 3)).copy()
            with torch.no_grad():
                expected = method.eval()(torch.from_numpy(pixels).float() / 255).numpy()
            rows = of_features.starts[place] + np.arange(count)
            np.testing.assert_allclose(found.gather(rows)[..., 0, 0], expected, rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(Pictures(found).of(rows), pixels)
    assert found.manifest.class_names[:4] == ["c0", "c0 90°", "c1", "c1 90°"]


def test_the_manifest_names_dataset_network_and_weights(turned, features, network):
    made, whole = read_manifest(features).network, read_network(features, read_manifest(features))
    assert made["dataset"] == {"name": "turned", "fingerprint": read_manifest(turned).fingerprint}
    assert made["backbone"] == BACKBONE and made["input"] == INPUT
    assert all(torch.equal(whole.weights[name], tensor) for name, tensor in network.weights.items())
    (Path(features) / NETWORK).rename(Path(features) / "away")
    with pytest.raises(PipelineError, match="missing; make them again"):
        read_network(features, read_manifest(features))
    (Path(features) / "away").rename(Path(features) / NETWORK)


def test_the_same_bytes_by_one_actor_and_over_what_was_there(
    ray_session, turned, features, network, tmp_path, monkeypatch
):
    """Shards that are there are not computed again, and those of other work are of no use."""
    monkeypatch.setattr("pipeline.evaluation.embed_dataset.cores", lambda: 1)
    target = Target(str(tmp_path / "again"), resume=True)
    place = Path(target.place)
    target.leave()
    (place / "part-0123456789abcdef-000000.json").write_text("{}")  # of other work
    (place / "shard-0123456789abcdef.arrow").write_bytes(b"")
    assert content(embedded(turned, tmp_path / "again", network)) == content(features)


def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(ray_session, glyphs, tmp_path):
    """The whole job is killed, Ray with it; the same command goes on, and computes only what is missing."""
    root, name = glyphs.rsplit("/", 1)
    job = [sys.executable, "-m", "jobs.embed", f"data.root={root}", f"data.name={name}", "cluster.object_store_mb=150",
           "backbone=conv4", "backbone.width=48", "name=killed"]  # fmt: skip
    place = Path(root) / ".killed.partial"
    victim = subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    while len(list(place.glob("part-*.json"))) < 2:
        assert victim.poll() is None, victim.stdout.read().decode()
        time.sleep(0.01)
    for process in [*psutil.Process(victim.pid).children(recursive=True), psutil.Process(victim.pid)]:
        process.send_signal(signal.SIGKILL)
    victim.wait()
    recorded = [place / json.loads(path.read_text())["file"] for path in place.glob("part-*.json")]
    left = {path: path.stat().st_mtime_ns for path in recorded}  # one more may be whole, but not recorded
    assert 2 <= len(left) < 11, "the job was not killed in its middle"
    done = subprocess.run(job, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "shards are there already" in done.stdout
    killed = Path(root) / "killed"
    assert all((killed / path.name).stat().st_mtime_ns == when for path, when in left.items())
    made = read_manifest(str(killed))
    again = Path(embedded(glyphs, tmp_path / "whole", read_network(str(killed), made)))
    assert {shard.file for shard in made.shards} == {path.name for path in again.glob("*.arrow")}
    assert all((killed / s.file).read_bytes() == (again / s.file).read_bytes() for s in made.shards)
    assert made.shards == read_manifest(str(again)).shards
    assert not [p for p in os.listdir(killed) if p.startswith(("part-", "."))]


@pytest.mark.parametrize("method", ["prototypical", "simple_shot", "baseline"])
def test_episodes_and_accuracies_are_those_of_the_images(ray_session, turned, features, network, method):
    options = {"baseline": {"head": "ridge"}}.get(method, {})
    spec = {"method": {"name": method, **options}, "backbone": {"name": "features"}, "way": 2, "classes": 12,
            "input": {"shape": list(Dataset(features).shape), "scaling": "features"}}  # fmt: skip
    torch.manual_seed(1)
    on_features = Model(spec, dict(build_model(spec).state_dict()), "run", features)
    on_images = model_for(on_features, turned)
    assert on_images.spec["backbone"] == BACKBONE and model_for(on_features, features) is on_features
    found = []
    for model, uri in ((on_features, features), (on_images, turned)):
        protocols = [EpisodicProtocol(uri, split, 3, 2, 5, episodes=30, seed=5) for split in ("test", "train")]
        found.append([result.accuracies for result in evaluate(model, protocols)])
    np.testing.assert_array_equal(*found)
    with pytest.raises(PipelineError, match="holds features: give dataset=FOLDER of images"):
        model_for(on_images, features)


def test_features_by_another_network_are_not_taken_for_those_of_the_training(turned, features, network, tmp_path):
    """A folder of features made again by another network of the same width is refused; those of other images by the
    same network are not."""
    spec = {"method": {"name": "prototypical"}, "backbone": {"name": "features"}, "way": 2, "classes": 12,
            "input": {"shape": list(Dataset(features).shape), "scaling": "features"}}  # fmt: skip
    again = shutil.copytree(features, tmp_path / "again")
    trained = read_manifest(features)
    head = model_of(Checkpoint(0, spec, {}, {"fingerprint": trained.fingerprint, "uri": str(again)}, {}, [], {}), "one")
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text(replace(trained, name="other").to_json())
    assert model_for(head, str(again)) is head and model_for(head, str(other)) is head
    flipped = Network(BACKBONE, INPUT, {name: -tensor for name, tensor in network.weights.items()})
    changed = replace(trained, network={**(trained.network or {}), **flipped.description})
    (other / "manifest.json").write_text(changed.to_json())
    with pytest.raises(PipelineError, match="other holds features by another network than those that one was trained"):
        model_for(head, str(other))
    (again / "manifest.json").write_text(changed.to_json())
    (again / NETWORK).write_bytes(flipped.content)
    for dataset in (str(again), turned):
        with pytest.raises(PipelineError, match="again holds other features than one was trained on: make those again"):
            model_for(head, dataset)


def test_a_retraining_on_features_is_of_the_images_that_they_were_made_of(turned, features, tmp_path):
    """Its champion takes images, and says their fingerprint."""
    assert images_of(features) == (turned, read_manifest(turned)) == images_of(turned)
    stale = read_manifest(features)
    network = {**(stale.network or {}), "dataset": {"name": "turned", "fingerprint": "before"}}
    (tmp_path / "manifest.json").write_text(replace(stale, network=network).to_json())
    with pytest.raises(PipelineError, match="features of .*turned as it was before: make those again, with jobs.embed"):
        images_of(str(tmp_path))


def test_a_registered_model_takes_images(turned, features, network):
    """What is registered is the head with the network below it, and its dataset is the images'."""
    spec = {"method": {"name": "prototypical", "scale": 3.0}, "backbone": {"name": "features"}, "way": 2, "classes": 12,
            "input": {"shape": list(Dataset(features).shape), "scaling": "features"}}  # fmt: skip
    head = build_model(spec)
    about = {"name": "features", "fingerprint": read_manifest(features).fingerprint, "uri": features}
    made = whole_checkpoint(Checkpoint(1, spec, {}, about, {}, [], dict(head.state_dict())))
    assert made.dataset == {"name": "turned", "fingerprint": read_manifest(turned).fingerprint, "uri": turned}
    classifier = FewShotClassifier.from_weights(made.spec, made.model)
    images = Dataset(turned).gather(np.arange(75))  # of the three test classes, as they are
    enrolment = classifier.enrol(images[[0, 1, 25, 26, 50, 51]], ["a", "a", "b", "b", "c", "c"])
    answers = classifier.classify(enrolment, images, "none")
    table, stored = class_table(read_manifest(features), "test"), Dataset(features)
    known = np.concatenate([stored.gather(table.starts[p] + np.arange(25)) for p in (0, 2, 4)])
    vectors = torch.from_numpy(known)[None]
    with torch.no_grad():
        state = head.eval().adapt(vectors[:, [0, 1, 25, 26, 50, 51]], torch.tensor([[0, 0, 1, 1, 2, 2]]), 3)
        expected = head.classify(state, vectors)[0].softmax(-1).numpy()
    np.testing.assert_allclose(answers.probabilities, expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(PipelineError, match="holds other features"):
        whole_checkpoint(Checkpoint(1, spec, {}, {**about, "fingerprint": "0"}, {}, [], {}))


def test_views_are_augmented_images_and_training_draws_them(ray_session, turned, network, tmp_path):
    how = Augmentation(flip=True, crop_padding=3)
    uri = embedded(turned, tmp_path / "views", network, views=2, augmentation=how, seed=4)
    stored, images = Dataset(uri), Dataset(turned)
    rows, batch = stored.manifest.rows, 63  # 28 x 28
    assert rows == 600 and stored.manifest.views == 2 and stored.manifest.stored_rows == 1800
    pixels = torch.from_numpy(Pictures(stored).of(np.arange(batch)))
    backbone = build_backbone(BACKBONE, (1, 28, 28))
    backbone.load_state_dict(network.weights)
    for view in (1, 2):
        changed = augment(pixels, how, step_generator("cpu", "view", 4, view, 0))
        with torch.no_grad():
            expected = backbone.eval()(build_preprocess({"input": INPUT})(changed)).numpy()
        found = stored.gather(view * rows + np.arange(batch))[..., 0, 0]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert images.manifest.rows == 300  # before they were turned
    table, views = class_table(stored.manifest, "train"), Views(2, rows, 7)
    for planner in (
        EpisodePlanner(table, EpisodeSpec(4, 2, 3, 6), 7, views=views),
        ImagePlanner(table, 24, 7, (2, 3), views),
        ImagePlanner(table, 24, 7, None, views),
    ):
        bare = replace(planner, views=None)
        both = [np.concatenate([p.plan(step, 1, 2).rows.reshape(-1) for step in range(8)]) for p in (planner, bare)]
        np.testing.assert_array_equal(both[0] % rows, both[1] % rows)
        assert set(both[0] // rows) == {0, 1, 2}
        together = planner.plans(0, 8, 1, 2)
        np.testing.assert_array_equal(np.concatenate([plan.rows.reshape(-1) for plan in together]), both[0])
    step, batch_ = next(local_batches(stored, EpisodePlanner(table, EpisodeSpec(4, 2, 3, 6), 7, views=views), 0, 1))
    assert step == 0 and batch_.support.shape == (6, 8, stored.shape[0], 1, 1) and batch_.support.dtype == torch.float32


def test_the_ready_campaign_of_heads_has_heads_that_take_features(features, tmp_path):
    root, name = features.rsplit("/", 1)
    arguments = ["campaign=heads", f"base.data.root={root}", f"base.data.name={name}", "base.train.query=2"]
    campaign = begin(compose("tune", translate([*arguments, f"storage={tmp_path}", "tracking=none", "name=small"])))
    heads = [campaign.prepare(values, f"small-{number}").spec for number, values in enumerate(campaign.first)]
    assert len({spec["method"]["name"] for spec in heads}) == len(campaign.config.space["method"]["choices"])
    assert all(spec["backbone"]["name"] == "features" for spec in heads)


def test_an_actor_computes_every_shard_in_the_same_memory(turned, network, tmp_path):
    """Else blocks of features come to lie between those of activations, and the process grows by one of these."""
    actor = Embedder(Embedding.of(turned, network, None, 2**20, False), str(tmp_path), None, "0" * 16, gpu=False)
    kept = []
    for number, part in enumerate((range(126), range(126, 252), range(567, 600))):
        work = {"number": number, "view": 0, "start": part.start, "stop": part.stop}
        [record] = actor({name: np.asarray([value]) for name, value in work.items()})["shard"]
        kept.append(actor.values)
        dataset, file = actor.dataset, str(tmp_path / json.loads(record)["file"])
        stored = map_shard(file, (int(actor.network.out_features), 1, 1), len(part), "features")
        alone = embed_part(actor.network, actor.preprocess, dataset, whole_table(dataset.manifest), part, actor.device)
        np.testing.assert_array_equal(stored[..., 0, 0], alone)
    assert kept[0] is kept[1] is kept[2]


def test_code_of_ones_own_goes_to_the_actors(turned, tmp_path, monkeypatch):
    """To other machines too, which have neither the file nor a note of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    file = tmp_path / "net.py"
    file.write_text("from torch import nn\n\n\nclass Net(nn.Sequential):\n    def __init__(self):\n"
                    "        super().__init__(nn.Flatten(), nn.Linear(784, 7))\n")  # fmt: skip
    options = described(settle({"name": "module", "path": str(file)}))
    network = Network(options, INPUT, dict(build_backbone(options, (1, 28, 28)).state_dict()))
    how = Embedding.of(turned, network, None, 2**20, False)
    file.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(own_code, "_sent", {})
    actor = Embedder(pickle.loads(pickle.dumps(how)), str(tmp_path), None, "0" * 16, gpu=False)
    assert actor.network.out_features == 7


def test_features_that_are_no_numbers_are_refused(ray_session, turned, network, tmp_path):
    name = next(iter(network.weights))
    broken = replace(network, weights={**network.weights, name: network.weights[name] * float("nan")})
    with pytest.raises(PipelineError, match="NaN or infinite"):
        embedded(turned, tmp_path / "nan", broken)


def test_a_store_that_is_away_is_no_mistake(turned, network, tmp_path, monkeypatch):
    actor = Embedder(Embedding.of(turned, network, None, 2**20, False), str(tmp_path), None, "0" * 16, gpu=False)

    def away(*_):
        raise Unavailable("s3://bucket does not answer")

    monkeypatch.setattr("pipeline.evaluation.embed_dataset.write_shard", away)
    work = {"number": 0, "view": 0, "start": 0, "stop": 9}
    found = actor({name: np.asarray([value]) for name, value in work.items()})
    assert found == {"number": [0], "shard": [""], "refused": ["s3://bucket does not answer"], "later": [True]}
