"""A network in a file anywhere works at once, is only ever the code that was meant, and travels with its model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.models import Model as MlflowModel

from pipeline.data.dataset import Dataset
from pipeline.errors import PipelineError
from pipeline.evaluation.model import Model
from pipeline.inference import FewShotClassifier
from pipeline.nets import build_backbone, own_code
from pipeline.nets.norm import batch_norms
from pipeline.registry.package import save_model
from pipeline.training.learner import Learner
from pipeline.training.loop import Hooks, train
from pipeline.training.prepare import prepare
from pipeline.weights import settle
from tests.training.conftest import small_run  # noqa: F401

SHAPE = (1, 12, 12)
NET = """
import torch
from torch import nn
import blocks
from shapes.sizes import WIDTH
from .blocks import Block as Same

class Mine(nn.Module):
    def __init__(self, depth=1, shape=None):
        super().__init__()
        import blocks as again
        assert again.Block is Same is blocks.Block
        self.conv = nn.Conv2d(shape[0], WIDTH, 3)
        self.blocks = nn.Sequential(*[blocks.Block(WIDTH) for _ in range(depth)])
    def forward(self, x):
        return self.blocks(self.conv(x)).mean((2, 3)) + {shift}
"""
BLOCKS = """
from torch import nn
import statistics

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
    def forward(self, x):
        return x + self.norm(x).relu()
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(own_code, "_sent", {})


def write(folder: Path, shift: int = 0, width: int = 5) -> str:
    (folder / "shapes").mkdir(parents=True)
    (folder / "net.py").write_text(NET.replace("{shift}", str(shift)))
    (folder / "blocks.py").write_text(BLOCKS)
    (folder / "shapes" / "__init__.py").write_text("")
    (folder / "shapes" / "sizes.py").write_text(f"WIDTH = {width}")
    (folder / "unrelated.py").write_text("raise RuntimeError")
    return str(folder / "net.py")


def test_a_plain_module_works_with_what_it_imports(tmp_path):
    path = write(tmp_path / "a")
    net = build_backbone({"name": "module", "path": path, "options": {"depth": 2}, "freeze": 1}, SHAPE)
    assert net.out_features == 5 and len(net.network.blocks) == 2
    assert [n for n, p in net.network.named_parameters() if not p.requires_grad] == ["conv.weight", "conv.bias"]
    assert set(own_code.sources_at(path)) == {"net.py", "blocks.py", "shapes/__init__.py", "shapes/sizes.py"}
    assert own_code.outside(own_code.sources_at(path)) == {"torch"}
    plain = str(Path(__file__).parent / "own_network.py")
    assert build_backbone({"name": "module", "path": plain}, (3, 20, 20)).out_features == 8, "and lazy layers"


def test_code_of_the_same_names_stays_apart(tmp_path):
    nets = [
        build_backbone({"name": "module", "path": write(tmp_path / str(shift), shift, width)}, SHAPE).eval()
        for shift, width in ((0, 5), (100, 6))
    ]
    found = [net(torch.zeros(1, *SHAPE)) for net in nets]
    assert [f.shape[1] for f in found] == [5, 6] and float(found[0].detach().max()) < 50 < float(
        found[1].detach().min()
    )
    assert not {"net", "blocks", "shapes"} & set(sys.modules)


def test_this_package_is_no_part_of_a_file_that_lies_beside_it(tmp_path):
    """In the root of a checkout: a copy's layers were not known as ours, and every change of ours was one of the run's
    code, which it then refused to go on with."""
    (tmp_path / "pipeline").symlink_to(Path(own_code.__file__).parents[1])
    lines = ["from torch import nn", "import pipeline.errors", "from pipeline.nets.norm import BatchNorm"]
    net = "class Mine(nn.Sequential):\n  def __init__(self): super().__init__(BatchNorm(1), nn.Flatten())"
    (tmp_path / "net.py").write_text("\n".join([*lines, net]))
    assert list(own_code.sources_at(str(tmp_path / "net.py"))) == ["net.py"]
    backbone = build_backbone(settle({"name": "module", "path": str(tmp_path / "net.py")}), SHAPE)
    assert list(batch_norms(backbone)) == ["network.0"]


def test_only_the_code_that_was_meant_is_run(tmp_path):
    path = write(tmp_path / "a")
    options = settle({"name": "module", "path": path})
    Path(path).write_text(NET.replace("{shift}", "1"))
    build_backbone(options, SHAPE)  # what this machine's user gave is kept
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(PipelineError, match="this model's own code .* is not on this machine"):
        build_backbone(options, SHAPE)
    write(tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    own_code.send(own_code.sources_at(str(tmp_path / "b" / "net.py")))  # from the process that began the run
    build_backbone(options, SHAPE)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read as Python"),
        ("def broken(:", "cannot be read as Python"),
        ("import no_such_library", r"cannot be imported \(ModuleNotFoundError"),
        ("x = 1", "backbone.model=None: give the class of net.py that is the network: it has none"),
        ("from ..above import x", "imports from outside the folder"),
        ("class Mine(nn.Module):\n  def forward(self, x): return x", r"of shape \[2, 1, 12, 12\] for 2 images"),
        ("class Mine(nn.Module):\n  def forward(self, x): return x, x", "returns a tuple: it must return one tensor"),
        ("class Mine(nn.Module):\n  def forward(self, x): return x.view(3)", "fails on an image of shape"),
        ("class Mine(nn.Module):\n  out_features = 7\n  def forward(self, x): return x.flatten(1)",
         "says out_features=7, but returns 144 features"),
        ("class A(nn.Module): pass\nclass B(nn.Module): pass", "that is the network: A, B"),
        ("class Mine(nn.Module):\n  def __init__(self, must): pass", "Mine needs must"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(tmp_path, text, says, monkeypatch):
    path = tmp_path / "net.py"
    if text is not None:
        path.write_text(f"from torch import nn\n{text}\n")
    monkeypatch.chdir(tmp_path)
    for given in (str(path), "net.py"):
        with pytest.raises(PipelineError, match=says) as caught:
            build_backbone({"name": "module", "path": given}, SHAPE)
        assert "\n" not in str(caught.value)


def test_a_network_that_learns_nothing_answers(tmp_path):
    """Pixels as they are, under a method without parameters of its own: what steps=0 measures and registers."""
    net = "class Pixels(nn.Module):\n  def forward(self, x): return x.flatten(1)"
    (tmp_path / "pixels.py").write_text(f"from torch import nn\n{net}\n")
    spec = {
        "method": {"name": "matching"},
        "backbone": settle({"name": "module", "path": str(tmp_path / "pixels.py")}),
        "input": {"shape": list(SHAPE), "scaling": "unit"},
    }
    FewShotClassifier.from_weights(spec, {}).save(tmp_path / "model")
    classifier = FewShotClassifier.load(tmp_path / "model")
    images = np.random.default_rng(0).integers(0, 256, (3, *SHAPE), dtype=np.uint8)
    assert classifier.classify(classifier.enrol(images, [1, 2, 3]), images[::-1].copy()).labels == [3, 2, 1]


PROGRAM = """
import sys
import numpy as np
import mlflow
images = np.load("images.npy")
for number, folder in enumerate(sys.argv[1:]):
    model = mlflow.pyfunc.load_model(folder).unwrap_python_model().classifier
    np.save(f"logits{number}.npy", model.logits(model.enrol(images[:3], list(range(3))), images))
"""


def trained(config, raw, run) -> FewShotClassifier:
    learner, saved = Learner(config, run.spec), []
    learner.begin(run)
    train(learner, iter(()), Dataset(config.dataset_uri), 4, hooks=Hooks(save=saved.append))
    return FewShotClassifier.from_weights(run.spec, saved[0].checkpoint(raw, run.dataset).model)


def test_it_travels_with_the_registered_model(tmp_path, small_run):  # noqa: F811
    images = np.random.default_rng(0).integers(0, 256, (6, 1, 28, 28), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    expected = []
    for shift in (0, 100):
        options = [
            f"backbone.path={write(tmp_path / str(shift), shift)}",
            "backbone.options={depth:2}",
            f"seed={shift}",
        ]
        small = [o for o in ("backbone=module", *options, "steps=0", "validation.episodes=2", "validation.way=2")]
        prepared = prepare(small_run("prototypical", *small))
        model = trained(*prepared)
        expected.append(model.logits(model.enrol(images[:3], list(range(3))), images))
        save_model(model, tmp_path / f"model{shift}", MlflowModel())
        assert Model(prepared[2].spec, None).code == own_code.sources_at(str(tmp_path / str(shift) / "net.py"))
        shutil.rmtree(tmp_path / str(shift))
    shutil.rmtree(tmp_path / "cache")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XDG_CACHE_HOME")}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "model0"), str(tmp_path / "model100")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for number, logits in enumerate(expected):
        assert np.array_equal(np.load(tmp_path / f"logits{number}.npy"), logits)
    described = json.loads((tmp_path / "model0" / "artifacts" / "classifier" / "model.json").read_text())
    assert "class Mine" not in json.dumps(described), "a description names code and does not hold it"


def test_what_others_could_not_load_is_not_registered(tmp_path, small_run, monkeypatch):  # noqa: F811
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "not_beside.py").write_text("WIDTH = 5")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    path = write(tmp_path / "a")
    Path(path).write_text("import yaml, not_beside\n" + Path(path).read_text())
    small = ["backbone=module", f"backbone.path={path}", "steps=0", "validation.episodes=2", "validation.way=2"]
    model = trained(*prepare(small_run("prototypical", *small)))
    with pytest.raises(PipelineError, match="cannot be loaded where only .* No module named 'not_beside'"):
        save_model(model, tmp_path / "model", MlflowModel())
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["net.v2.py", "net.txt", "net", ".net.py"])
def test_a_file_whose_name_no_module_can_have_is_told_as_that(tmp_path, name):
    file = tmp_path / name
    file.write_text("from torch import nn\n\nclass Mine(nn.Flatten):\n    pass")
    with pytest.raises(PipelineError, match=r"a module is a file NAME.py, without another dot: rename it$"):
        settle({"name": "module", "path": str(file)})
    assert settle({"name": "module", "path": str(file.rename(tmp_path / "my-net.py"))})["model"] == "Mine"
