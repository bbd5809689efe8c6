"""First weights are those that were meant, and fit; a run keeps where they came from, and needs them once."""

from __future__ import annotations

import io
import os
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from pipeline import store
from pipeline.data.dataset import Dataset
from pipeline.errors import PipelineError
from pipeline.model import build_model
from pipeline.nets import build_backbone
from pipeline.training.checkpoint import save_checkpoint
from pipeline.training.learner import Learner
from pipeline.training.loop import Hooks, train
from pipeline.training.prepare import prepare
from pipeline.weights import described, give, origin, read, with_weights
from tests.nets.pretrained import encoder, encoder_folder, timm_file
from tests.training.conftest import small_run  # noqa: F401

SHAPE = (3, 64, 64)
NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.conv(x).mean((2, 3)))
"""
OUTER = """
class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = Net()

    def forward(self, x):
        return self.module(x)
"""


def refusal(options) -> str:
    with pytest.raises(PipelineError) as caught:
        with_weights(options, SHAPE)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch /tmp/this-must-not-be-there",)


def test_what_does_not_fit_is_listed(tmp_path):
    path = timm_file(tmp_path)
    tensors, options = load_file(path), {"name": "timm", "model": "test_resnet", "weights": path}
    backbone = build_backbone(described(options), SHAPE)
    assert read(backbone, options).left == ["fc.bias", "fc.weight"]
    tensors["conv1.0.weight"] = torch.zeros(1, 2)
    del tensors["bn1.weight"]
    save_file(tensors, path)
    said = refusal(options)
    assert "of another shape: conv1.0.weight [1, 2], not [" in said and "missing: bn1.weight" in said
    assert "not the network's: fc.bias, fc.weight" in said and "input.scaling=backbone" in said


def test_rows_for_every_inner_step_begin_with_the_one_of_the_file(tmp_path):
    path = timm_file(tmp_path)
    options = {"name": "timm", "model": "test_resnet", "weights": path}
    about = {"backbone": described(options), "way": 5, "input": {"shape": [*SHAPE]}}
    network = build_model({**about, "method": {"name": "maml_plus_plus"}}).backbone
    assert give(network, options) is not None
    expected, found = load_file(path), dict(network.network.named_parameters())
    assert found["bn1.weight"].shape == (5, *expected["bn1.weight"].shape)
    assert all(torch.equal(value, expected[name].expand_as(value)) for name, value in found.items())


def test_a_second_network_begins_with_them_too(tmp_path, small_run):  # noqa: F811
    """Meta Networks' second one is frozen with the first: it would stay as it was drawn."""
    path = timm_file(tmp_path)
    options = ["backbone=timm", "backbone.model=test_resnet", f"backbone.weights={path}", "backbone.freeze=all"]
    options += ["input.scaling=backbone"]
    config, _, run = prepare(small_run("meta_networks", *options))
    learner = Learner(config, run.spec)
    learner.begin(run)
    second = dict(learner.method.key_backbone.network.named_parameters())
    assert not any(parameter.requires_grad for parameter in second.values())
    expected = load_file(path)
    assert all(torch.equal(p, expected[n]) for n, p in second.items())


@pytest.mark.parametrize("wrapped", ["_orig_mod.{}", "module.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "{}"])
@pytest.mark.parametrize("own", ["", "module."], ids=["plain", "its own name is module"])
def test_names_are_taken_that_compiled_and_distributed_modules_give(tmp_path, wrapped, own):
    (tmp_path / "net.py").write_text(NET if not own else NET + OUTER)
    options = {"name": "module", "path": str(tmp_path / "net.py"), "model": "Outer" if own else "Net"}
    kept = build_backbone(options, SHAPE).network.state_dict()
    assert all(name.startswith(own) for name in kept)
    save_file({wrapped.format(name): tensor for name, tensor in kept.items()}, tmp_path / "w.safetensors")
    found = read(build_backbone(options, SHAPE), {**options, "weights": str(tmp_path / "w.safetensors")})
    assert not found.left and all(torch.equal(found.tensors[name], kept[name]) for name in kept)


def test_what_is_no_file_of_weights_is_refused_and_runs_nothing(tmp_path):
    options = {"name": "timm", "model": "test_resnet"}
    contents = {
        "a.safetensors": b"no tensors", "b.pth": b"", "c.pth": b"garbage", "d.safetensors": b"",
        "e.pt": b"PK\x03\x04 a zip file, almost",
    }  # fmt: skip
    for name, thing in (("f.pth", Harmful()), ("g.pth", [1, 2]), ("h.pth", {"epoch": 3, "state_dict": {"a": 1}})):
        buffer = io.BytesIO()
        torch.save(thing, buffer)
        contents[name] = buffer.getvalue()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert "is no file of weights" in refusal({**options, "weights": str(tmp_path / name)}), name
    assert not Path("/tmp/this-must-not-be-there").exists()
    assert "does not exist" in refusal({**options, "weights": str(tmp_path / "nothing.safetensors")})
    assert refusal({**options, "weights": str(tmp_path)}) == f"{tmp_path} cannot be read (Is a directory)"


def test_the_hash_is_that_of_the_file(tmp_path):
    path = timm_file(tmp_path)
    options = {"name": "timm", "model": "test_resnet", "weights": path}
    digest = sha256(Path(path).read_bytes()).hexdigest()
    assert read(build_backbone(described(options), SHAPE), options).sha256 == digest
    with_weights({**options, "weights_sha256": digest}, SHAPE)
    assert f"are other weights: SHA-256 {digest}, not abc" in refusal({**options, "weights_sha256": "abc"})


def test_weights_in_a_bucket(tmp_path, moto_bucket):
    path, uri = timm_file(tmp_path), f"{moto_bucket}/weights/net.safetensors"
    store.write_bytes(uri, Path(path).read_bytes())
    here, there = (with_weights({"name": "timm", "model": "test_resnet", "weights": w}, SHAPE) for w in (path, uri))
    assert all(torch.equal(a, b) for a, b in zip(here.parameters(), there.parameters(), strict=True))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refusal({"name": "timm", "model": "tf_efficientnet_lite0", "weights": "hub"})
    assert "the weights of tf_efficientnet_lite0 cannot be had" in said and "give backbone.weights=FILE" in said


@pytest.mark.parametrize("kind", ["timm", "huggingface"])
@pytest.mark.parametrize("method", ["simple_shot", "prototypical"])
def test_a_run_begins_with_them_and_goes_on_without(tmp_path, small_run, kind, method):  # noqa: F811
    if kind == "timm":
        source = timm_file(tmp_path)
        model, file = "test_resnet", Path(source)
        digest = sha256(file.read_bytes()).hexdigest()
    else:
        model = encoder_folder(tmp_path)
        source = "hub"
        tensors = {n: t for n, t in encoder("ViT").state_dict().items() if not n.startswith("pooler.")}
        digest = sha256(save({name: tensors[name] for name in sorted(tensors)})).hexdigest()
    options = [f"backbone={kind}", f"backbone.model={model}", f"backbone.weights={source}", "input.scaling=backbone"]
    config, raw, run = prepare(small_run(method, "steps=0", *options))
    assert raw["backbone"]["weights"] == source and raw["backbone"]["weights_sha256"] == digest
    assert run.spec["backbone"]["weights"] is None and run.spec["backbone"]["weights_sha256"] == digest
    assert run.spec["input"]["size"] == ([160, 160] if kind == "timm" else [32, 32])
    learner, saved = Learner(config, run.spec), []
    learner.begin(run)
    train(learner, iter(()), Dataset(config.dataset_uri), 4, hooks=Hooks(save=saved.append))
    weights = with_weights(config.backbone, (3, *run.spec["input"]["size"])).state_dict()
    assert all(torch.equal(learner.method.backbone.state_dict()[name], tensor) for name, tensor in weights.items())
    if kind == "timm":  # other weights in the same place are refused
        file.unlink()
        timm_file(tmp_path, seed=1)
        os.rename(tmp_path / "test_resnet-1.safetensors", file)
        with pytest.raises(PipelineError, match="are other weights"):
            Learner(config, run.spec).begin(run)
        file.unlink()
    again = Learner(config, run.spec)  # goes on from a checkpoint: nothing is read
    again.restore(saved[0].checkpoint(raw, run.dataset))
    save_checkpoint(str(tmp_path / "begun"), saved[0].checkpoint(raw, run.dataset))
    later = [option for option in options if not option.startswith("backbone.weights")]
    _, raw, run = prepare(small_run(method, "steps=0", *later, "backbone.weights=null", f"initial={tmp_path}/begun"))
    assert raw["backbone"]["weights"] is None and raw["backbone"]["weights_sha256"] == digest
    assert origin(run.spec["backbone"]) is not None, "it is told of the weights that the first run began with"
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 5, 1, 28, 28), dtype=np.uint8))
    with torch.no_grad():
        found = [n.method.eval().backbone(n.preprocess(images)[0]) for n in (learner, again)]
    assert torch.equal(*found)
