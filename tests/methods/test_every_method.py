"""Every method's whole road: trained by two workers, far better than untrained, registered, pulled, answering."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import compose
from pipeline.data.dataset import Dataset, class_table
from pipeline.data.episodes import EpisodeSpec, plan_episodes
from pipeline.workflow import train
from tests.registry.test_clean_environment import make_environment
from tests.training.conftest import METHODS as SMALL_RUNS
from tests.training.conftest import OPTIONS

METHODS = [pytest.param(name, id=name) for name in SMALL_RUNS]
SHORT = [
    "steps=200", "log_every=50", "train.way=5", "train.shot=1", "train.query=5", "train.meta_batch_size=8",
    "backbone.width=32",
    "validation.every=200", "validation.episodes=40", "validation.query=5", "checkpoint.every=200",
    "evaluation.untrained=true", "evaluation.episodes=150", "evaluation.way=[5]", "evaluation.shot=[1]",
    "evaluation.query=5", "train.batch_size=64",
]  # fmt: skip
LONGER = {  # what a method needs to be far better than untrained after a minute or two
    "matching": ["method.scale=10"],
    "snail": ["steps=600", "optimizer.lr=2e-3"],
    "conditionally_shifted": ["steps=600"],
    "meta_networks": ["steps=300", "train.meta_batch_size=4", "method.filters=32", "method.hidden=32"],
    "meta_lstm": ["backbone.width=16", "backbone.eps=1e-3", "clip.norm=0.25", "optimizer.lr=5e-3",
                  "method.inner_steps=5", "method.inner_steps_eval=5"],
    "maml_plus_plus": ["backbone.negative_slope=0.01", "method.inner_steps=3", "method.inner_steps_eval=3"],
    "reptile": ["steps=500", "train.shot=5", "optimizer=sgd", "optimizer.lr=1.0", "optimizer.momentum=0.0",
                "optimizer.nesterov=false", "optimizer.weight_decay=0.0", "schedule=linear"],
    "imprinted": ["steps=400", "optimizer.lr=3e-3"],
    "clustering": ["steps=400", "optimizer.lr=3e-3"],
    "baseline": ["steps=1500", "optimizer.lr=3e-3"],
    "discriminative_kshot": ["steps=1500", "optimizer.lr=3e-3"],
    "proxy_nca": ["steps=1000", "optimizer.lr=1e-3", "augmentation.crop_padding=2", "augmentation.flip=true"],
}  # fmt: skip
PROGRAM = """
import importlib.util, json, sys
import numpy as np, mlflow
assert importlib.util.find_spec("ray") is None and importlib.util.find_spec("pipeline") is None
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
given = dict(np.load(sys.argv[3]))
truth = given.pop("query_labels")
table = model.predict(given, params={"threshold": "none"})
print(json.dumps(float((table["label"].to_numpy() == truth).mean())))
"""


@pytest.fixture(scope="session")
def tracking(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tracking")
    return {"uri": f"sqlite:///{folder}/mlflow.db", "artifacts": str(folder / "artifacts")}


@pytest.fixture(scope="session")
def clean_python(tmp_path_factory):
    """A function from a tracking store with the model "people" to the interpreter of an environment made for it."""
    made: list[str] = []

    def get(tracking: dict) -> str:
        if not made:
            made.append(make_environment(tracking, tmp_path_factory.mktemp("clean") / "venv"))
        return made[0]

    return get


@pytest.fixture(scope="session")
def omniglot(tmp_path_factory, real_data) -> str:
    from pipeline.data.ingest import ingest

    root = tmp_path_factory.mktemp("omniglot")
    ingest(compose("ingest", ["data=omniglot", f"data.source.path={real_data / 'omniglot'}", f"data.root={root}"]))
    return f"{root}/omniglot"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("data", ["glyphs", "omniglot"])
@pytest.mark.parametrize("method", METHODS)
def test_road(ray_session, request, tmp_path, tracking, clean_python, method, data):
    uri = request.getfixturevalue(data)
    root, name = uri.rsplit("/", 1)
    place = [f"data.root={root}", f"data.name={name}", f"storage={tmp_path}/runs", f"name={method}"]
    place += [f"tracking.{key}={value}" for key, value in tracking.items()] + ["register_as=people"]
    options = [o for o in OPTIONS.get(method, []) if not o.startswith(("augmentation.", "train.batch_size"))]
    raw = compose("train", [f"method={method}", *SHORT, *options, *LONGER.get(method, []), *place])
    made = train(raw)
    trained, untrained = (  # of the same episodes
        next(e for e in made["evaluation"] if (e["model"] == "untrained") == first) for first in (False, True)
    )
    margin = 3 * (trained["interval"] + untrained["interval"])
    assert trained["accuracy"] > untrained["accuracy"] + margin or trained["accuracy"] > 0.95, (trained, untrained)
    accuracy = ask_elsewhere(clean_python(raw["tracking"]), tracking["uri"], made["model"], uri, tmp_path)
    assert accuracy > 0.6


def ask_elsewhere(python: str, tracking_uri: str, model: str, dataset_uri: str, folder: Path) -> float:
    """Accuracy of the pulled model on 5 unseen classes with 2 images each, in an environment of its own."""
    dataset = Dataset(dataset_uri)
    plan = plan_episodes(class_table(dataset.manifest, "test"), EpisodeSpec(5, 2, 8), 1, np.arange(1))
    images = dataset.gather(plan.rows)
    s = plan.support
    np.savez(
        folder / "given.npz",
        support_images=images[:s], support_labels=plan.labels[0, :s],
        query_images=images[s:], query_labels=plan.labels[0, s:],
    )  # fmt: skip
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "RAY_"))}
    command = [python, "-c", PROGRAM, tracking_uri, model, str(folder / "given.npz")]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return float(json.loads(done.stdout.splitlines()[-1]))
