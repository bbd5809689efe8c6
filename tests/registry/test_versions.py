"""Registered models: once for a content, with their tags, pulled by alias or number."""

from __future__ import annotations

import html
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline import store
from pipeline.commands import from_anywhere
from pipeline.config import compose
from pipeline.errors import PipelineError
from pipeline.inference import Calibration, CalibrationPoint, FewShotClassifier
from pipeline.model import build_model
from pipeline.nets import own_code
from pipeline.pages.build import make_pages
from pipeline.pages.reading import read_site
from pipeline.registry.aliases import alias_version, roll_back
from pipeline.registry.publish import publish
from pipeline.registry.tracking import all_models
from pipeline.registry.tracking_config import TrackingConfig, store_uri
from pipeline.registry.versions import pull, register, register_run, set_alias
from pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from pipeline.weights import settle
from tests.registry.conftest import DATASET, SPEC, add_checkpoint

POINT = CalibrationPoint(5, 1, -1e-5, 0.05, 0.2, 0.1, 0.9, 100, 100)
CALIBRATION = Calibration(0.05, "val", 0, (POINT,))


def test_version_carries_where_it_came_from(run: Path, tracking: dict) -> None:
    published = publish(str(run), tracking)
    made = register_run(str(run), tracking)
    assert (made.name, made.version, made.created, made.run_id) == ("people", 1, True, published.run_id)
    tags = MlflowClient(tracking_uri=tracking["uri"]).get_model_version("people", "1").tags
    assert tags["pipeline.run"] == "first-run" and tags["step"] == "8"
    assert tags["dataset.fingerprint"] == DATASET["fingerprint"] and len(tags["config.hash"]) == 64
    assert (
        tags["code.version"]
        and tags["accuracy.5way_1shot"] == "0.910000"
        and tags["interval.20way_5shot"] == "0.020000"
    )
    assert json.loads(tags["episodes.5way_1shot"]) == {
        "split": "test", "way": 5, "shot": 1, "query": 15, "episodes": 600, "seed": 7,
    }  # fmt: skip


def test_registering_twice_gives_one_version(run: Path, tracking: dict) -> None:
    first, second = register_run(str(run), tracking), register_run(str(run), tracking)
    assert first.version == second.version == 1 and not second.created
    add_checkpoint(run, 8, seed=5)  # other weights
    assert register_run(str(run), tracking).version == 2
    calibration = json.dumps(CALIBRATION.to_dict()).encode()
    store.write_bytes(str(run / "report" / "calibration.json"), calibration)
    assert register_run(str(run), tracking).version == 3
    assert register_run(str(run), tracking).version == 3
    assert register_run(str(run), tracking, "others").uri == "models:/others/1"


def test_a_later_evaluation_is_added_to_the_version(run: Path, tracking: dict) -> None:
    register_run(str(run), tracking)
    results = [{"split": "test", "way": 5, "shot": 1, "accuracy": 0.95, "interval": 0.001, "episodes": 9000}]
    store.write_bytes(str(run / "report" / "evaluation.json"), json.dumps(results).encode())
    assert not register_run(str(run), tracking).created
    tags = MlflowClient(tracking_uri=tracking["uri"]).get_model_version("people", "1").tags
    assert tags["accuracy.5way_1shot"] == "0.950000" and json.loads(tags["episodes.5way_1shot"])["episodes"] == 9000


def test_what_was_measured_of_an_earlier_checkpoint_is_not_said_of_a_later_one(
    run: Path, tracking: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that went on and was killed before it was measured again has the report of its first end."""
    report = run / "report"
    results = [{**result, "step": 8} for result in json.loads((report / "evaluation.json").read_text())]
    store.write_bytes(str(report / "evaluation.json"), json.dumps(results).encode())
    store.write_bytes(str(report / "calibration.json"), json.dumps({**CALIBRATION.to_dict(), "step": 8}).encode())
    version, client = register_run(str(run), tracking), MlflowClient(tracking_uri=tracking["uri"])
    assert "accuracy.5way_1shot" in client.get_model_version("people", "1").tags
    assert pull(version.uri, tracking).calibration == CALIBRATION and "note" not in capsys.readouterr().out
    checkpoint = load_checkpoint(str(run / "step_000012"))
    checkpoint.history[-1]["val/accuracy"] = 0.99  # the best from here on
    save_checkpoint(run / "step_000012", checkpoint)
    later = register_run(str(run), tracking)
    tags = client.get_model_version("people", str(later.version)).tags
    assert later.version == 2 and tags["step"] == "12" and not [key for key in tags if key.startswith("accuracy.")]
    assert pull(later.uri, tracking).calibration is None
    said = capsys.readouterr().out
    assert "not of step 12" in said and f"python -m jobs.evaluate run={run} publish=true tracking.uri=" in said


@pytest.mark.parametrize(
    "failing", ["create_logged_model", "log_model_artifacts", "finalize_logged_model", "create_model_version"]
)
def test_an_interrupted_registration_is_finished(
    run: Path, tracking: dict, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MlflowException("the server is away")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, failing, fail)
        with pytest.raises(PipelineError, match=r"register the run later with: .*jobs.register run=\S+/runs/first-run"):
            register_run(str(run), tracking)
    assert register_run(str(run), tracking).version == 1
    client = MlflowClient(tracking_uri=tracking["uri"])
    experiment = client.get_experiment_by_name("tests").experiment_id
    assert len(client.search_logged_models([experiment])) == 1
    assert pull("models:/people/1", tracking).spec == SPEC


def test_pull_by_alias_number_and_mistake(run: Path, tracking: dict, pictures: np.ndarray) -> None:
    checkpoint = load_checkpoint(str(run / "step_000008"))
    register("first-run", checkpoint, tracking, "people", calibration=CALIBRATION)
    set_alias(tracking, "people", "champion", 1)
    pulled = pull("models:/people@champion", tracking)
    own = FewShotClassifier.from_weights(SPEC, checkpoint.model)
    assert pulled.fingerprint == own.fingerprint and pulled.calibration == CALIBRATION
    assert pulled.origin["run"] == "first-run" and pulled.origin["step"] == 8
    assert "hunter2" not in json.dumps(pulled.origin)
    for uri, message in [
        ("models:/people@winner", r"no such version of 'people'; it has versions up to 1 and @champion \(version 1\)"),
        ("models:/people/7", "no such version of 'people'"),
        ("models:/nobody/1", "no registered model 'nobody'; there is people"),
        ("people@champion", "give models:/NAME@ALIAS"),
    ]:
        with pytest.raises(PipelineError, match=message):
            pull(uri, tracking)


def test_a_network_of_ones_own_is_pulled_where_its_file_is_not(
    run: Path, tracking: dict, pictures: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    net = tmp_path / "net.py"
    net.write_text(
        "from torch import nn\n\nclass Flat(nn.Module):\n    def forward(self, x):\n        return x.flatten(1)\n"
    )
    spec = {**SPEC, "backbone": settle({"name": "module", "path": str(net)})}
    checkpoint = replace(load_checkpoint(str(run / "step_000008")), spec=spec, model=build_model(spec).state_dict())
    register("first-run", checkpoint, tracking, "own")
    net.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of another machine"))
    monkeypatch.setattr(own_code, "_sent", {})
    model = pull("models:/own/1", tracking)
    classes = model.enrol(pictures[:3, :2].reshape(-1, 1, 16, 16), ["a", "a", "b", "b", "c", "c"])
    assert model.logits(classes, pictures[:3, 3]).argmax(-1).tolist() == [0, 1, 2]


def test_models_beyond_a_page_of_the_store_are_known(
    run: Path, tracking: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.registry.tracking._PAGE", 3)
    register_run(str(run), tracking, "people")
    client = MlflowClient(tracking_uri=tracking["uri"])
    for number in range(12):
        client.create_registered_model(f"model-{number:02d}")
    assert len(list(all_models(client))) == 13
    for name, message in (
        ("people/7", "no such version of 'people'; it has versions up to 1"),
        ("peopel/1", "no registered model 'peopel'; there is people, model-00, .* and 3 more"),
    ):
        with pytest.raises(PipelineError, match=message):
            pull(f"models:/{name}", tracking)
    with pytest.raises(PipelineError, match="no registered model 'model-99'; there is model-09, .* and 3 more"):
        alias_version(client, "model-99", "champion")


def test_looking_for_a_model_makes_no_store(tmp_path: Path, tracking: dict) -> None:
    mistyped = {**tracking, "uri": f"sqlite:///{tmp_path}/mistyped/mlflow.db"}
    for look in (
        lambda: pull("models:/people/1", mistyped),
        lambda: roll_back(mistyped, "people"),
        lambda: set_alias(mistyped, "people", "champion", 1),
    ):
        with pytest.raises(PipelineError, match="mistyped/mlflow.db: there is no such file, and so no model"):
            look()
    read_site(mistyped)
    assert not (tmp_path / "mistyped").exists()


@pytest.mark.parametrize("folder", ["feature%2Fx", "a?b", "50%"])
def test_a_store_is_in_its_folder_whatever_is_in_the_folders_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """SQLAlchemy reads a URI, in which "%2F" is a slash and "?" the end; what the user writes as one stays one."""
    (tmp_path / folder).mkdir()
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path / folder))
    usual = compose("train")["tracking"]
    version = register_run(str(run), usual, "people").version
    assert (tmp_path / folder / "mlflow.db").is_file() and list((tmp_path / folder / "mlartifacts").iterdir())
    monkeypatch.delenv("PIPELINE_HOME")
    monkeypatch.chdir(tmp_path / folder)
    here = compose("train")["tracking"]
    assert from_anywhere(here) == from_anywhere(usual) == usual
    for tracking in (here, {**here, "uri": "sqlite:///mlflow.db?timeout=30"}):
        assert pull(f"models:/people/{version}", tracking).origin["run"] == "first-run"
    assert [model.name for model in read_site(here).models] == ["people"]
    (tmp_path / "a b.db").touch()
    asked = TrackingConfig(**{**here, "uri": f"sqlite:///{tmp_path}/a%20b.db"})
    assert store_uri(asked, make=False) == f"sqlite:///{tmp_path}/a b.db"


def test_aliases_can_only_name_what_is_there(run: Path, tracking: dict) -> None:
    with pytest.raises(PipelineError, match="try again"):
        set_alias(tracking, "people", "champion", 1)


def test_a_bad_name_is_refused_before_anything_is_made(run: Path, tracking: dict) -> None:
    with pytest.raises(PipelineError, match="register_as='a/b'"):
        register_run(str(run), tracking, "a/b")


def test_pyfunc_gives_the_answers_of_the_classifier(
    run: Path, tracking: dict, pictures: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(str(run / "step_000008"))
    register("first-run", checkpoint, tracking, "people", calibration=CALIBRATION)
    own = FewShotClassifier.from_weights(SPEC, checkpoint.model, CALIBRATION)
    mlflow.set_tracking_uri(tracking["uri"])
    loaded = mlflow.pyfunc.load_model("models:/people/1")
    support, labels = pictures[:5, :2].reshape(-1, 1, 16, 16), np.repeat(np.arange(5), 2) * 10
    queries = pictures[:, 4]
    given = {"support_images": support, "support_labels": labels, "query_images": queries}
    table = loaded.predict(given, params={"top_k": 3})
    answers = own.classify(own.enrol(support, labels), queries)
    assert table["label"].tolist() == answers.labels and table["known"].tolist() == answers.known.tolist()
    np.testing.assert_array_equal(table["score"], answers.scores.astype(float))
    np.testing.assert_array_equal(np.stack(table["top_probabilities"]), answers.top(3)[1].astype(float))
    assert table["top_labels"].tolist() == answers.top(3)[0] and not table["known"].all()
    assert loaded.predict(given, params={"threshold": "none"})["known"].all()
    served = loaded.unwrap_python_model()
    enrolment = served.enrol(support, [f"person {label}" for label in labels])
    enrolment.save(tmp_path / "people.safetensors")
    empty = {**given, "support_images": support[:0], "support_labels": labels[:0]}
    monkeypatch.setenv("PIPELINE_ENROLMENTS", str(tmp_path))
    by_file = loaded.predict(empty, params={"enrolment": "people.safetensors", "threshold": "none"})
    assert by_file["label"].tolist() == [f"person {label}" for label in answers.labels]
    example = loaded.input_example
    assert len(loaded.predict(example)) == len(example["query_images"])
    for wrong in ({**given, "query_images": queries.astype(np.float32)}, {"support_images": support}):
        with pytest.raises(MlflowException):
            loaded.predict(wrong)


def test_the_accuracy_of_a_version_is_that_of_the_test_classes(run: Path, tracking: dict) -> None:
    shape = {"way": 5, "shot": 1, "interval": 0.01, "episodes": 10}
    results = [{"split": "test", "accuracy": 0.5, **shape}, {"split": "val", "accuracy": 0.9, **shape}]
    for found in (results, results[::-1]):
        store.write_bytes(str(run / "report" / "evaluation.json"), json.dumps(found).encode())
        version = register_run(str(run), tracking)
        tags = MlflowClient(tracking_uri=tracking["uri"]).get_model_version("people", str(version.version)).tags
        assert tags["accuracy.5way_1shot"] == "0.500000" and json.loads(tags["episodes.5way_1shot"])["split"] == "test"


def test_what_is_registered_later_gets_the_name_that_was_asked_for(
    run: Path, tracking: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MlflowException("the server is away")

    monkeypatch.setattr(MlflowClient, "create_registered_model", fail)
    for name, told in ((None, []), ("others", ["register_as=others"])):
        with pytest.raises(PipelineError) as refused:
            register_run(str(run), tracking, name)
        _, _, _, folder, *words = shlex.split(str(refused.value).partition("later with: ")[2])
        assert folder == f"run={run}" and [word for word in words if "tracking" not in word] == told


def test_a_page_says_how_its_own_store_gets_what_is_missing(run: Path, tracking: dict, tmp_path: Path) -> None:
    publish(str(run), tracking)
    register_run(str(run), tracking)
    made = make_pages(tracking, str(tmp_path / "html"))
    text = html.unescape("".join((tmp_path / "html" / page).read_text() for page in made["pages"]))
    (said,) = re.findall(r"python -m jobs.evaluate [^<]*", text)
    found = compose("evaluate", shlex.split(said)[3:])
    assert found["publish"] and found["tracking"]["uri"] == tracking["uri"]
    assert found["tracking"]["experiment"] == tracking["experiment"]
