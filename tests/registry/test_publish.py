"""A run's folder in MLflow: whole, once, without secrets, and completed after any failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file

from pipeline.errors import PipelineError
from pipeline.pages.leaderboard import parameters
from pipeline.registry.publish import publish
from tests.registry.conftest import DATASET, add_checkpoint, entry


def only_run(tracking: dict):
    client = MlflowClient(tracking_uri=tracking["uri"])
    experiment = client.get_experiment_by_name(tracking["experiment"])
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def histories(client: MlflowClient, run_id: str) -> dict[str, list[tuple[int, float]]]:
    names = client.get_run(run_id).data.metrics
    return {name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)] for name in names}


def check_whole(tracking: dict, tmp_path: Path, run: Path, last: int = 12) -> None:
    client, found = only_run(tracking)
    run_id = found.info.run_id
    assert found.info.status == "FINISHED" and found.info.run_name == "first-run"
    assert found.data.tags["pipeline.run"] == "first-run"
    assert found.data.tags["dataset.fingerprint"] == DATASET["fingerprint"]
    assert {"config.hash", "code.version", "dataset.name"} <= set(found.data.tags)
    assert found.data.params["method.scale"] == "1.0" and found.data.params["lists"] == "[1, [2, 3]]"
    series = histories(client, run_id)
    assert series["train/loss"] == [(s, 2.0 / s) for s in range(1, last + 1)]
    assert series["val/accuracy"] == [(s, entry(s)["val/accuracy"]) for s in range(4, last + 1, 4)]
    assert series["test/accuracy_5way_1shot"] == [(8, 0.91)] and series["test/interval_20way_5shot"] == [(8, 0.02)]
    files = Path(client.download_artifacts(run_id, "", str(tmp_path)))
    best = load_file(files / "checkpoints" / "best" / "model.safetensors")
    kept = load_file(run / "step_000008" / "model.safetensors")
    assert best.keys() == kept.keys() and all((best[name] == kept[name]).all() for name in kept)
    assert yaml.safe_load((files / "config.yaml").read_text())["method"] == {"name": "prototypical", "scale": 1.0}
    environment = json.loads((files / "environment.json").read_text())
    assert any(line.startswith("torch==") for line in environment["packages"]) and environment["python"]
    assert (files / "plots" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (files / "plots" / "learning_curve.svg").read_bytes()
    assert (files / "report" / "evaluation.json").exists()


def test_everything_is_there_once(run: Path, tracking: dict, tmp_path: Path) -> None:
    first = publish(str(run), tracking)
    check_whole(tracking, tmp_path / "a", run)
    again = publish(str(run), tracking)
    check_whole(tracking, tmp_path / "b", run)
    assert first.run_id == again.run_id and first.metrics_added == 12 + 3 + 3 + 4 and again.metrics_added == 0
    assert first.checkpoint.endswith("step_000008")


def test_figures_that_are_measured_again_take_the_place_of_the_first(run: Path, tracking: dict) -> None:
    publish(str(run), tracking)
    file = run / "report" / "evaluation.json"
    file.write_text(json.dumps([{**result, "accuracy": 0.5} for result in json.loads(file.read_text())]))
    assert publish(str(run), tracking).metrics_added == 2 and publish(str(run), tracking).metrics_added == 0
    metrics = only_run(tracking)[1].data.metrics
    assert metrics["test/accuracy_5way_1shot"] == 0.5 and metrics["test/interval_20way_5shot"] == 0.02


def test_a_run_that_went_on_is_completed(run: Path, tracking: dict, tmp_path: Path) -> None:
    publish(str(run), tracking)
    add_checkpoint(run, 16)
    publish(str(run), tracking)
    check_whole(tracking, tmp_path / "a", run, last=16)


def test_a_run_that_became_longer_says_so(run: Path, tracking: dict, tmp_path: Path) -> None:
    """MLflow changes no parameter: pages would have the first number of steps beside the last accuracy for ever."""

    def publish_with(steps: int) -> None:
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**record, "config": {**record["config"], "steps": steps}}))
        publish(str(run), tracking)

    for steps in (12, 24, 24, 36):
        publish_with(steps)
        client, found = only_run(tracking)
        assert found.data.params["steps"] == "12" and parameters(found)["steps"] == steps
        stored = client.download_artifacts(found.info.run_id, "config.yaml", str(tmp_path))
        assert yaml.safe_load(Path(stored).read_text())["steps"] == steps
    assert [key for key in found.data.tags if key.startswith("pipeline.changed.")] == ["pipeline.changed.steps"]


@pytest.mark.parametrize("failing", ["log_batch", "log_text", "log_artifacts", "set_tag", "set_terminated"])
def test_a_failure_anywhere_is_completed_by_the_next_call(
    run: Path, tracking: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MlflowException("the server is away")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, failing, fail)
        with pytest.raises(PipelineError, match="the server is away; publish the run later with: python -m jobs.regi"):
            publish(str(run), tracking)
    publish(str(run), tracking)
    check_whole(tracking, tmp_path / "a", run)


def test_no_secret_leaves_the_folder(run: Path, tracking: dict, tmp_path: Path) -> None:
    publish(str(run), tracking)
    client, found = only_run(tracking)
    files = Path(client.download_artifacts(found.info.run_id, "", str(tmp_path / "files")))
    seen = [path for path in files.rglob("*") if path.is_file()]
    assert len(seen) >= 8
    assert not [path.name for path in seen if b"hunter2" in path.read_bytes()]
    assert b"hunter2" not in Path(tracking["uri"].removeprefix("sqlite:///")).read_bytes()
    assert found.data.params["server.uri"] == "https://***@host/path"
    assert found.data.params["dataset.uri"] == "s3://***@host/glyphs?token=***"
    assert found.data.params["server.password"] == "***" and found.data.params["server.tokens"] == "None"


def test_an_unreachable_server_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = {"uri": "http://me:hunter2@127.0.0.1:9", "artifacts": None, "experiment": "tests", "timeout": 1}
    with pytest.raises(PipelineError, match=r"publish the run later with: .*jobs.register run=\S+/runs/first-run") as e:
        publish(str(run), server)
    assert "\n" not in str(e.value) and "hunter2" not in str(e.value) and "http://***@127.0.0.1:9" in str(e.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uri": None}, "tracking.uri is null"),
        ({"uri": "mlflow.db"}, "give sqlite:///FILE"),
        ({"urii": "x"}, "unknown key 'urii'"),
    ],
)
def test_bad_tracking_is_refused(run: Path, tracking: dict, change: dict, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        publish(str(run), {**tracking, **change})


def test_a_deleted_experiment_is_named(run: Path, tracking: dict) -> None:
    client = MlflowClient(tracking_uri=tracking["uri"])
    client.delete_experiment(client.create_experiment("tests"))
    with pytest.raises(PipelineError, match="this experiment was deleted; restore it"):
        publish(str(run), tracking)


def test_a_relative_store_is_refused_in_a_submitted_job(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    tracking = {"uri": "sqlite:///mlflow.db", "artifacts": None, "experiment": "tests", "timeout": 1}
    with pytest.raises(PipelineError, match="a folder that is thrown away"):
        publish(str(run), tracking)


def test_no_run_is_one_line(tmp_path: Path, tracking: dict) -> None:
    with pytest.raises(PipelineError, match="no run at"):
        publish(str(tmp_path), tracking)
