"""The registered model in a virtual environment that has neither this repository nor Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from pipeline.inference import Enrolment, FewShotClassifier
from pipeline.registry.versions import register, set_alias
from pipeline.training.checkpoint import load_checkpoint
from tests.registry.conftest import SPEC
from tests.registry.test_versions import CALIBRATION

PROGRAM = """
import importlib.util, json, os, sys
import numpy as np
import mlflow
assert importlib.util.find_spec("ray") is None and importlib.util.find_spec("pipeline") is None
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/people@champion")
import pipeline
given = dict(np.load("given.npz"))
table = model.predict(given, params={"top_k": 2})
served = model.unwrap_python_model()
enrolment = served.enrol(given["support_images"], [f"p{label}" for label in given["support_labels"]])
extended = served.extend(enrolment, given["more_images"], ["new"] * len(given["more_images"]))
extended.save("people.safetensors")
loaded = served.load_enrolment("people.safetensors")
answers = served.classify(loaded, given["query_images"])
empty = {**given, "support_images": given["support_images"][:0], "support_labels": given["support_labels"][:0]}
os.environ["PIPELINE_ENROLMENTS"] = "."
by_file = model.predict(empty, params={"enrolment": "people.safetensors"})
assert by_file["label"].tolist() == answers.labels
print(json.dumps({
    "package": pipeline.__file__,
    "modules": [name for name in ("ray", "pyarrow.dataset", "hydra") if name in sys.modules],
    "labels": table["label"].tolist(), "known": table["known"].tolist(), "scores": table["score"].tolist(),
    "top": table["top_labels"].tolist(), "extended": answers.labels, "extended_scores": answers.scores.tolist(),
    "note": extended.note, "probabilities": answers.probabilities.tolist(),
}))
"""


@pytest.mark.timeout(900)
def test_pulled_model_gives_equal_answers(run: Path, tracking: dict, pictures: np.ndarray, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(run / "step_000008"))
    register("first-run", checkpoint, tracking, "people", calibration=CALIBRATION)
    set_alias(tracking, "people", "champion", 1)
    given = {
        "support_images": pictures[:5, :2].reshape(-1, 1, 16, 16),
        "support_labels": np.repeat(np.arange(5), 2),
        "query_images": pictures[:, 4],
        "more_images": pictures[7, :2],
    }
    there = tmp_path / "elsewhere"
    there.mkdir()
    np.savez(there / "given.npz", **given)
    python = make_environment(requirements_of(tracking), tmp_path / "clean")
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "RAY_"))}
    done = subprocess.run(
        [python, "-c", PROGRAM, tracking["uri"]], cwd=there, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads(done.stdout.splitlines()[-1])
    assert "/code/pipeline/" in got["package"] and got["modules"] == []
    own = FewShotClassifier.from_weights(SPEC, checkpoint.model, CALIBRATION)
    answers = own.classify(own.enrol(given["support_images"], given["support_labels"]), given["query_images"])
    assert got["labels"] == answers.labels and got["known"] == answers.known.tolist()
    assert got["top"] == answers.top(2)[0]
    np.testing.assert_allclose(got["scores"], answers.scores, rtol=1e-5, atol=1e-8)
    enrolment = own.enrol(given["support_images"], [f"p{label}" for label in given["support_labels"]])
    extended = own.extend(enrolment, given["more_images"], ["new"] * 2)
    answers = own.classify(extended, given["query_images"])
    assert got["extended"] == answers.labels and got["note"] == "1 classes added, 5 untouched"
    np.testing.assert_allclose(got["extended_scores"], answers.scores, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(got["probabilities"], answers.probabilities, rtol=1e-5)
    theirs = Enrolment.load(there / "people.safetensors")  # and what was enrolled there is valid here
    assert own.classify(theirs, given["query_images"]).labels == answers.labels


def requirements_of(tracking: dict) -> Path:
    client = MlflowClient(tracking_uri=tracking["uri"])
    return Path(client.get_model_version_download_uri("people", "1").removeprefix("file://")) / "requirements.txt"


def make_environment(requirements: Path, folder: Path) -> str:
    """A new environment with torch at the model's version and then the model's own requirements."""
    pinned = f"torch=={torch.__version__.split('+')[0]}"
    assert pinned in requirements.read_text().split()
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    for wanted in ([pinned], ["-r", str(requirements)]):
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert "ray " not in listed and sys.prefix not in listed
    return python
