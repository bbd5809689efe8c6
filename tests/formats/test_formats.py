"""What earlier revisions wrote is read, and answers as it did. ``make.py`` beside this made the files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load

from pipeline import store
from pipeline.config import compose, validate
from pipeline.data.dataset import Dataset
from pipeline.inference import Enrolment
from pipeline.retraining.config import settings_of
from pipeline.retraining.journal import Journal
from pipeline.search.ledger import Ledger
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.config import TrainConfig
from pipeline.training.learner import Learner
from pipeline.training.prepare import prepare
from pipeline.workflow import evaluate_job, train
from tests.formats import make

FILES = Path(__file__).parent / "files"
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # other processors round otherwise


@pytest.fixture(scope="session")
def answers() -> dict[str, np.ndarray]:
    with np.load(FILES / "answers.npz") as content:
        return dict(content)


@pytest.fixture(scope="session")
def stored(moto_bucket) -> str:
    """The files in the object store that they were made in."""
    import boto3

    client = boto3.client("s3")
    for path in FILES.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "pipeline-tests", f"formats/{path.relative_to(FILES)}")
    return make.STORE


def test_a_dataset(stored, answers):
    """Shards, classes and fingerprint; of PNG files the same pixels."""
    assert np.array_equal(make.images_of(make.DATASET), answers["pixels"])
    assert np.array_equal(make.images_of(make.ENCODED), answers["pixels"][:72])
    for uri, fingerprint in ((make.DATASET, "fingerprint"), (make.ENCODED, "encoded fingerprint")):
        manifest = Dataset(uri).manifest
        assert manifest.fingerprint == str(answers[fingerprint])
        assert set(manifest.splits) == {"train", "val", "test"}


@pytest.mark.parametrize("name", make.METHODS)
def test_a_checkpoint_answers(stored, answers, name):
    np.testing.assert_allclose(make.logits_of(name), answers[name], **CLOSE)


@pytest.mark.parametrize("name", make.METHODS)
def test_a_run_can_be_resumed(stored, name):
    """As far as its configuration goes: it is read, completed and checked against today's schema and dataset."""
    config, _, run = prepare(compose("train", [f"resume={name}", f"storage={make.STORE}/runs"]))
    assert config.steps == 4 and run.name == name and config.validation.episodes == 4


@pytest.mark.parametrize("name", make.METHODS)
def test_weights_and_optimizers_are_restored_to_the_bit(stored, name):
    """Of TADAM's run the optimizers of both phases."""
    kept = f"{make.STORE}/runs/{name}/step_00000002"
    config, raw, run = prepare(compose("train", [f"resume={name}", f"storage={make.STORE}/runs"]))
    learner = Learner(config, run.spec)
    learner.restore(load_checkpoint(kept))
    found = learner.checkpoint(raw, run.dataset)
    for tensors, file in ((found.model, "model"), (found.optimizer, "optimizer")):
        old = load(store.read_bytes(f"{kept}/{file}.safetensors"))
        assert tensors.keys() == old.keys() and all(torch.equal(tensors[key], value) for key, value in old.items())
    assert found.step == 2 and len(learner.optimizers) == 1 + (name == "tadam")


@pytest.mark.parametrize("name", ["baseline", "matching"])
def test_a_run_goes_on_to_the_same_weights(stored, ray_session, name):
    """From step 2 to what step 4 was, with SGD's momentum and with Adam's moments.

    In these runs what processors round otherwise stays below 1e-6; in TADAM's, on pixels as they are, two steps make
    more than 1 of it.
    """
    again, kept = f"{make.STORE}/again", f"{make.STORE}/runs/{name}"
    files = ("model.safetensors", "optimizer.safetensors", "state.json")
    for file in ("run.json", *(f"step_00000002/{file}" for file in files)):
        store.write_bytes(f"{again}/{name}/{file}", store.read_bytes(f"{kept}/{file}"))
    train(compose("train", [f"resume={name}", f"storage={again}"]))
    new, old = (load(store.read_bytes(f"{run}/step_00000004/{files[0]}")) for run in (f"{again}/{name}", kept))
    assert new.keys() == old.keys()
    for key, tensor in old.items():
        np.testing.assert_allclose(new[key], tensor, **CLOSE, err_msg=key)


def test_an_evaluation(stored, ray_session):
    given = ["run=prototypical", f"storage={make.STORE}/runs", *make.EVALUATE]
    found = evaluate_job(compose("evaluate", given))
    expected = json.loads((FILES / "evaluation.json").read_text())
    for one, other in zip(found["results"], expected["results"], strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose(one["accuracies"], other["accuracies"], atol=0.11)  # one query of ten, at most
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=0.01)


def test_an_enrolment_and_what_it_is_extended_by(stored, answers):
    classifier = make.classifier_of("prototypical")
    support, labels, queries = make.support_and_queries(make.WAY)
    enrolment = Enrolment.load(FILES / "enrolment.safetensors")
    np.testing.assert_allclose(classifier.logits(enrolment, queries), answers["enrolment"], **CLOSE)
    extended = classifier.extend(enrolment, support[-2:], labels[-2:])
    np.testing.assert_allclose(classifier.logits(extended, queries), answers["extended"], **CLOSE)


PROGRAM = """
import json, sys
import mlflow, numpy as np
table = mlflow.pyfunc.load_model(sys.argv[1]).predict(dict(np.load(sys.argv[2])), params={"top_k": 2})
import pipeline
assert pipeline.__file__.startswith(sys.argv[1]), pipeline.__file__
print(json.dumps({name: table[name].tolist() for name in ("label", "score", "known")}))
"""


def test_a_registered_model_answers_with_the_code_that_it_carries(stored, answers, tmp_path):
    with zipfile.ZipFile(FILES / "model.zip") as archive:
        archive.extractall(tmp_path / "model")
    support, _, queries = make.support_and_queries(make.WAY)
    given = {"support_images": support, "support_labels": np.repeat(np.arange(make.WAY), 2), "query_images": queries}
    np.savez(tmp_path / "given.npz", **given)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "model"), str(tmp_path / "given.npz")],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["label"] == answers["model label"].tolist() and found["known"] == answers["model known"].tolist()
    np.testing.assert_allclose(found["score"], answers["model score"], **CLOSE)


def test_a_campaign(stored):
    """Its ledger, and the best configuration, which a training takes as it is."""
    where = f"{make.STORE}/runs/campaign"
    records = Ledger(where).search
    lines = [json.loads(line) for line in store.read_bytes(f"{where}/ledger.jsonl").decode().splitlines()]
    assert [record.run for record in records] == [line["run"] for line in lines] and len(records) == 2
    assert [(record.status, record.step) for record in records] == [("finished", 4), ("stopped", 2)]
    assert [record.score("best") for record in records] == [max(a for _, a in line["curve"]) for line in lines]
    best = compose("train", [f"config={FILES}/runs/campaign/best.yaml"])
    config = validate(TrainConfig, best)
    assert config.steps == 4 and config.method["name"] == "prototypical"
    assert config.train.way == yaml.safe_load((FILES / "runs/campaign/best.yaml").read_text())["train"]["way"]


def test_a_retraining_of_the_same_recipe_is_known(stored):
    [entry] = Journal(f"{make.STORE}/runs/people.retraining").entries
    assert (entry.stage, entry.outcome, entry.version) == ("done", "promoted", 1)
    settings = settings_of(compose("retrain", [*make.RETRAIN]))
    assert settings.recipe == entry.recipe, "whatever this command was given, it would train anew"
