"""Logins: taken from the environment, refused elsewhere, and in nothing that a training writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs._main import run
from pipeline import train
from pipeline.config import compose
from pipeline.credentials import refuse_logins, split_login
from pipeline.errors import PipelineError

ROOT = Path(__file__).resolve().parents[1]
PLANTED = {
    "AWS_ACCESS_KEY_ID": "PLANTEDaccesskeyid",
    "AWS_SECRET_ACCESS_KEY": "PLANTEDsecretaccesskey",
    "AWS_SESSION_TOKEN": "PLANTEDsessiontoken",
    "MLFLOW_TRACKING_PASSWORD": "PLANTEDtrackingpassword",
    "MLFLOW_TRACKING_TOKEN": "PLANTEDtrackingtoken",
    "RAY_AUTH_TOKEN": "PLANTEDrayauthtoken0123456789abcdef",
    "PGPASSWORD": "PLANTEDpgpassword",
    "HF_TOKEN": "PLANTEDhubtoken",
}


def test_a_login_in_the_address_becomes_mlflows_own_variables() -> None:
    environment = {"MLFLOW_TRACKING_URI": "https://anna:a%40b:c@mlflow.example:5000/x"}
    split_login(environment)
    assert environment == {
        "MLFLOW_TRACKING_URI": "https://mlflow.example:5000/x",
        "MLFLOW_TRACKING_USERNAME": "anna",
        "MLFLOW_TRACKING_PASSWORD": "a@b:c",
    }
    for untouched in ({}, {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}, {"MLFLOW_TRACKING_URI": "sqlite:////a@b"}):
        before = dict(untouched)
        split_login(untouched)
        assert untouched == before


def test_variables_that_are_set_go_first() -> None:
    environment = {
        "MLFLOW_TRACKING_URI": "http://a:b@m",
        "MLFLOW_TRACKING_USERNAME": "c",
        "MLFLOW_TRACKING_PASSWORD": "d",
    }
    split_login(environment)
    assert environment["MLFLOW_TRACKING_USERNAME"] == "c" and environment["MLFLOW_TRACKING_PASSWORD"] == "d"


@pytest.mark.parametrize(
    "argument",
    ["tracking.uri=http://anna:PLANTED@m", "tracking.uri=postgresql://anna:PLANTED@host/db", "x=s3://a:PLANTED@b"]
    + ["tracking.uri=postgresql://host/db?sslmode=require&password=PLANTED", "x=mysql://host/db?passwd=PLANTED"],
)
def test_a_login_elsewhere_is_refused_and_not_repeated(argument: str) -> None:
    for arguments, config in (([argument], {}), ([], {argument.partition("=")[0]: [argument.partition("=")[2]]})):
        with pytest.raises(PipelineError, match="holds a password") as refused:
            refuse_logins(arguments, config)
        assert "PLANTED" not in str(refused.value) and "\n" not in str(refused.value)


def test_ordinary_configurations_are_not_refused() -> None:
    for job in ("train", "tune", "evaluate", "ingest"):
        refuse_logins(["data.root=s3://bucket/a:b", "tracking.uri=http://127.0.0.1:5000"], compose(job))


def test_no_other_mistake_repeats_a_login(capsys: pytest.CaptureFixture[str]) -> None:
    """Of two wrong arguments the one that cannot be read is told with all that was given."""
    given = ["tracking.uri=http://anna:PLANTED@m", "steps=${oc.env:nothing.at.all}", "x y=1"]
    with pytest.raises(SystemExit) as ended:
        run("train", lambda config: {}, given)
    assert ended.value.code == 2 and "PLANTED" not in capsys.readouterr().err
    with pytest.raises(PipelineError, match="tracking.uri holds a password"):
        train(*given)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_that_a_training_writes_holds_a_planted_secret(glyphs: str, tmp_path: Path) -> None:
    """The run's folder, its log, the MLflow store with its artifacts, the registered model and Ray's logs, searched by
    bytes. The tracking server, whose address holds a password too, is away in the second training."""
    root, name = glyphs.rsplit("/", 1)
    small = [
        f"data.root={root}", f"data.name={name}", f"storage={tmp_path}/runs", "steps=4", "cluster.workers=1",
        "train.meta_batch_size=1",
        "train.query=5", "validation.every=2", "validation.episodes=10", "validation.query=5",
        "evaluation.episodes=10", "evaluation.query=5", "evaluation.shot=[1]", "backbone.width=8",
        "cluster.object_store_mb=150",
    ]  # fmt: skip
    login = "http://anna:PLANTEDurlpassword@127.0.0.1:9"
    # Ray's sockets allow no long path.
    ray_folder = Path("/tmp") / f"secrets-{os.getpid()}"
    environment = {
        **os.environ, **PLANTED, "PIPELINE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(ray_folder),
        "MLFLOW_TRACKING_URI": login, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "RAY_AUTH_MODE": "disabled",
    }  # fmt: skip
    environment.pop("AWS_ENDPOINT_URL", None)
    ray_folder.mkdir()
    try:
        for tracking in (["name=kept"], ["name=away", "tracking=server", "tracking.timeout=2"]):
            command = [sys.executable, "-m", "jobs.train", *small, *tracking]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
            (tmp_path / f"{tracking[0]}.log").write_text(done.stdout + done.stderr)
            assert done.returncode == (0 if tracking == ["name=kept"] else 75), done.stdout + done.stderr
        files = [file for folder in (tmp_path, ray_folder) for file in folder.rglob("*") if file.is_file()]
        names = {file.name for file in files}
        assert {"run.json", "state.json", "mlflow.db", "config.yaml", "MLmodel"} <= names, sorted(names)
        found = [file for file in files if b"PLANTED" in file.read_bytes()]
        assert not found, [(str(file), file.read_bytes().partition(b"PLANTED")[2][:20]) for file in found]
    finally:
        subprocess.run(["rm", "-rf", str(ray_folder)], check=False)
