"""The MLflow server of ``infra/mlflow``: what the files say, and a server started with the same flags."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.infra.kustomize import one

ROOT = Path(__file__).resolve().parents[2]
MLFLOW = ROOT / "infra" / "mlflow"
COMPOSE: dict[str, Any] = yaml.safe_load((MLFLOW / "compose.yaml").read_text())["services"]
PASSWORD = "a-password-of-the-test"


def flags(command: list[str]) -> dict[str, str]:
    assert command[:2] == ["mlflow", "server"]
    return dict(argument.split("=", 1) for argument in command[2:])


def test_compose_and_kubernetes_start_the_same_server() -> None:
    here = flags(COMPOSE["mlflow"]["command"])
    there = flags(one("production/mlflow", "Deployment")["spec"]["template"]["spec"]["containers"][0]["command"])
    assert here.keys() == there.keys()
    for name in here.keys() - {"--artifacts-destination", "--allowed-hosts"}:
        assert here[name] == there[name], name
    assert here["--app-name"] == "basic-auth"
    assert here["--artifacts-destination"].startswith("s3://") and there["--artifacts-destination"].startswith("s3://")


def test_only_named_hosts_are_answered() -> None:
    there = flags(one("production/mlflow", "Deployment")["spec"]["template"]["spec"]["containers"][0]["command"])
    for hosts in (re.search(r":-(.*)\}", flags(COMPOSE["mlflow"]["command"])["--allowed-hosts"])[1],
                  there["--allowed-hosts"]):  # fmt: skip
        assert not {"*", "*:*"} & set(hosts.split(",")) and all(":" in host for host in hosts.split(","))
    namespace = one("production/mlflow", "Deployment")["metadata"]["namespace"]
    assert f"mlflow.{namespace}.svc:5000" in there["--allowed-hosts"].split(",")


def test_the_server_is_published_on_loopback_and_the_database_not_at_all() -> None:
    assert COMPOSE["mlflow"]["ports"] == ["${MLFLOW_BIND:-127.0.0.1}:5000:5000"]
    assert "ports" not in COMPOSE["postgres"]


def test_passwords_come_from_a_file_that_is_not_here() -> None:
    for service in COMPOSE.values():
        assert service["env_file"] == ["${SECRETS:?the folder with mlflow-server.env}/mlflow-server.env"]
        assert not [name for name in service.get("environment", {}) if re.search("PASSWORD|SECRET", name)]
    for file in (*MLFLOW.iterdir(), *(ROOT / "infra").rglob("*.yaml")):
        text = file.read_text()
        assert not re.search(r"://[^/\s:@]+:[^/\s@]+@", text), f"{file}: a password in a URI"
        assert not re.search(
            r"(?im)^[ \t]*\S*(password|secret_key)[ \t]*[=:][ \t]*\S", re.sub(r"(?m)^\s*#.*$", "", text)
        ), file


def test_the_auth_database_is_made_beside_the_trackings() -> None:
    uri = re.search(r"^database_uri = (\S+)", (MLFLOW / "basic_auth.ini").read_text(), flags=re.M)[1]
    backend = flags(COMPOSE["mlflow"]["command"])["--backend-store-uri"]
    assert uri.rsplit("/", 1)[0] == backend.rsplit("/", 1)[0] and uri != backend
    assert f"CREATE DATABASE {uri.rsplit('/', 1)[1]} " in (MLFLOW / "databases.sql").read_text()
    init = one("production/mlflow", "ConfigMap")["data"]["databases.sql"]
    assert init == (MLFLOW / "databases.sql").read_text()


@pytest.fixture
def server(tmp_path: Path, moto_bucket: str) -> Iterator[str]:
    """A server with the flags and the permissions of the files; SQLite for PostgreSQL, moto for S3."""
    pytest.importorskip("flask_wtf", reason="needs mlflow[auth]")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = (MLFLOW / "basic_auth.ini").read_text()
    settings = re.sub(r"(?m)^database_uri = .*$", f"database_uri = sqlite:///{tmp_path}/auth.db", settings)
    (tmp_path / "basic_auth.ini").write_text(settings)
    used = flags(COMPOSE["mlflow"]["command"]) | {
        "--host": "127.0.0.1", "--port": str(port), "--workers": "1",
        "--backend-store-uri": f"sqlite:///{tmp_path}/server.db", "--artifacts-destination": f"{moto_bucket}/mlflow",
        "--allowed-hosts": "localhost:*,127.0.0.1:*",
    }  # fmt: skip
    env = {
        **os.environ,
        "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "basic_auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a-key-of-the-test",
    }
    log = tmp_path / "log"
    command = [sys.executable, "-m", "mlflow", "server", *(f"{name}={value}" for name, value in used.items())]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        uri = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            try:
                requests.get(f"{uri}/health", timeout=2).raise_for_status()
                break
            except requests.RequestException:
                time.sleep(0.3)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the group is this server's own session
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_only_who_has_the_password_is_served_and_artifacts_go_to_the_bucket(
    server: str, moto_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import store
    from pipeline.errors import PipelineError
    from pipeline.registry.tracking import connect, reaching

    tracking = {"uri": server, "artifacts": None, "experiment": "tests", "timeout": 30}
    monkeypatch.setenv("HOME", str(tmp_path))  # whose ~/.mlflow/credentials may hold a login
    for login in (None, ("admin", "a-guess")):
        for name, value in zip(("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"), login or (None, None),
                               strict=True):  # fmt: skip
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        with (
            pytest.raises(PipelineError, match="authenticated|401") as refused,
            reaching(tracking, "x"),
        ):
            connect(tracking)
        assert "a-guess" not in str(refused.value)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name)
    (tmp_path / ".mlflow").mkdir()  # as the mounted file of the nodes
    login_file = f"[mlflow]\nmlflow_tracking_username = admin\nmlflow_tracking_password = {PASSWORD}\n"
    (tmp_path / ".mlflow" / "credentials").write_text(login_file)
    found = connect(tracking)
    run = found.client.create_run(found.experiment_id)
    found.client.log_text(run.info.run_id, "kept", "note.txt")
    assert (
        store.read_bytes(f"{moto_bucket}/mlflow/{found.experiment_id}/{run.info.run_id}/artifacts/note.txt") == b"kept"
    )
    search = f"{server}/api/2.0/mlflow/experiments/search?max_results=1"
    rebound = requests.get(search, headers={"Host": "evil.example"}, auth=("admin", PASSWORD), timeout=10)
    assert rebound.status_code == 403
    assert PASSWORD not in (tmp_path / "log").read_text()
