"""A registered model of a library's network carries its weights: it answers as the run, with neither file nor hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from mlflow.models import Model

from pipeline.data.dataset import Dataset
from pipeline.data.write import write_dataset
from pipeline.inference import FewShotClassifier
from pipeline.registry.package import save_model
from pipeline.training.learner import Learner
from pipeline.training.loop import Hooks, train
from pipeline.training.prepare import prepare
from tests.conftest import OPERATORS
from tests.nets.pretrained import encoder_folder, timm_file
from tests.registry.test_clean_environment import make_environment
from tests.training.conftest import small_run  # noqa: F401

PROGRAM = """
import sys
import numpy as np
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1]).unwrap_python_model().classifier
images = np.load(sys.argv[2])
np.save(sys.argv[3], model.logits(model.enrol(images[:5], list(range(5))), images))
import pipeline
assert "/code/pipeline/" in pipeline.__file__
"""


def lite0(real_data: Path) -> list[str]:
    path = real_data / "pretrained" / "tf_efficientnet_lite0.safetensors"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return ["backbone=timm", "backbone.model=tf_efficientnet_lite0", f"backbone.weights={path}"]


def colours(folder: Path) -> list[str]:
    """A small dataset of coloured noise: a pass over all training images is not what this is about."""
    names = [f"c{number}" for number in range(10)]
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 3, 64, 64), dtype=np.uint8)
    splits = {"train": names[:6], "val": names[6:8], "test": names[8:]}
    write_dataset(str(folder / "colours"), "colours", zip(names, images, strict=True), splits)
    return [f"data.root={folder}", "data.name=colours"]


def saved(folder: Path, small_run, kind: str, method: list[str], real_data: Path | None) -> FewShotClassifier:  # noqa: F811
    """A run without steps on such a network, saved as a registered model is in ``folder / "model"``; the run's own."""
    remove = None
    if kind == "lite0":
        options = [*lite0(real_data), *colours(folder), "input.scaling=unit"]
    elif kind == "timm":
        remove = timm_file(folder)
        options = ["backbone=timm", "backbone.model=test_resnet", f"backbone.weights={remove}"]
    else:
        remove = encoder_folder(folder)
        options = ["backbone=huggingface", f"backbone.model={remove}"]
    if kind != "lite0":
        options += ["input.scaling=backbone"]
    options += ["steps=0", "validation.episodes=2", "validation.way=2"]
    config, raw, run = prepare(small_run(method[0], *method[1:], *options))
    learner, states = Learner(config, run.spec), []
    learner.begin(run)
    train(learner, iter(()), Dataset(config.dataset_uri), 4, hooks=Hooks(save=states.append))
    own = FewShotClassifier.from_weights(run.spec, states[0].checkpoint(raw, run.dataset).model)
    save_model(own, folder / "model", Model())
    if remove is not None:
        shutil.rmtree(remove) if os.path.isdir(remove) else os.remove(remove)
    return own


def answers(python: str, own: FewShotClassifier, folder: Path, environment: dict[str, str]) -> np.ndarray:
    """Logits of the saved model in another process, beside those of the run."""
    images = np.random.default_rng(0).integers(0, 256, (7, *own.shape), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    command = [python, "-c", PROGRAM, *(str(folder / name) for name in ("model", "images.npy", "logits.npy"))]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.stack([np.load(folder / "logits.npy"), own.logits(own.enrol(images[:5], list(range(5))), images)])


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("timm", ["simple_shot"]),
        ("huggingface", ["prototypical"]),
        ("lite0", ["simple_shot"]),
        ("lite0", ["baseline", "method.head=nearest"]),
    ],
)
def test_it_answers_as_the_run_bit_for_bit(tmp_path, small_run, request, kind, method):  # noqa: F811
    real = request.getfixturevalue("real_data") if kind == "lite0" else None
    own = saved(tmp_path, small_run, kind, method, real)
    library = "transformers" if kind == "huggingface" else "timm"
    assert f"{library}=={version(library)}" in (tmp_path / "model" / "requirements.txt").read_text().split()
    environment = {**os.environ, "PYTHONPATH": str(OPERATORS), "HF_HUB_OFFLINE": "1"}
    there, here = answers(sys.executable, own, tmp_path, environment)
    assert np.array_equal(there, here) and np.isfinite(here).all()
    described = json.loads((tmp_path / "model" / "artifacts" / "classifier" / "model.json").read_text())["spec"]
    assert described["backbone"]["weights"] is None and len(described["backbone"]["weights_sha256"]) == 64


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["lite0", "huggingface"])
def test_a_new_environment_with_its_requirements_is_all_it_needs(tmp_path, small_run, real_data, kind):  # noqa: F811
    own = saved(tmp_path, small_run, kind, ["simple_shot"], real_data)
    python = make_environment(tmp_path / "model" / "requirements.txt", tmp_path / "clean")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "RAY_"))}
    there, here = answers(python, own, tmp_path, {**kept, "PYTHONPATH": str(OPERATORS), "HF_HUB_OFFLINE": "1"})
    assert np.array_equal(there, here) and np.isfinite(here).all()
