"""The MLflow server of ``infra/mlflow``: what the files say, and a server started with the same flags."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.infra.kustomize import build, lasting_templates, one

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
    for file in (*MLFLOW.glob("*.*"), *(ROOT / "infra").rglob("*.yaml")):
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


def pod_of(overlay: str, kind: str, name: str) -> dict[str, Any]:
    [found] = [manifest for manifest in build(overlay)
               if manifest["kind"] == kind and manifest["metadata"]["name"] == name]  # fmt: skip
    [template] = lasting_templates(found)
    return template


def allowed(policy: str, labels: dict[str, str]) -> bool:
    """Whether the policy's one rule lets in a pod of the namespace with these labels."""
    [found] = [manifest for manifest in build("production/mlflow")
               if manifest["kind"] == "NetworkPolicy" and manifest["metadata"]["name"] == policy]  # fmt: skip
    [rule] = found["spec"]["ingress"]
    assert set(found["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    selectors = [source["podSelector"] for source in rule["from"]]
    return any(
        selector.get("matchLabels", {}).items() <= labels.items()
        and all(labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", []))
        for selector in selectors
    )


def test_only_ray_reaches_the_server_and_only_the_server_and_its_copies_the_database() -> None:
    ray, stranger = {"ray.io/is-ray-node": "yes"}, {"app": "stranger"}
    users = pod_of("production/mlflow", "Job", "mlflow-users")["metadata"]["labels"]
    server = pod_of("production/mlflow", "Deployment", "mlflow")["metadata"]["labels"]
    backup = pod_of("production/mlflow", "CronJob", "mlflow-backup")["metadata"]["labels"]
    restore = pod_of("production/restore", "Job", "mlflow-restore")["metadata"]["labels"]
    may = {"mlflow": [ray, users], "postgres": [server, backup, restore]}
    for policy, callers in may.items():
        for labels in (ray, users, server, backup, restore, stranger):
            assert allowed(policy, labels) is (labels in callers), (policy, labels)


def test_jobs_do_not_log_in_as_the_administrator() -> None:
    runbook = (ROOT / "infra" / "RUNBOOK.md").read_text()
    logins = re.findall(r"(?i)mlflow_tracking_username ?= ?(\w+)", runbook)
    assert len(logins) == 2 and set(logins) == {"jobs"}
    env = {
        entry["name"] for entry in pod_of("production/mlflow", "Job", "mlflow-users")["spec"]["containers"][0]["env"]
    }
    assert env == {"MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_JOBS_PASSWORD"}
    for name in env:
        assert f"{name}=%s" in runbook
    assert COMPOSE["users"]["command"][:2] == ["python", "/opt/mlflow/users.py"]
    host = COMPOSE["users"]["command"][2].removeprefix("http://").split(":")[0]
    assert f"{host}:*" in flags(COMPOSE["mlflow"]["command"])["--allowed-hosts"], "the server answers to this name"


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A PostgreSQL of its own, made as the manifests make theirs; the environment that reaches it."""
    folder = shutil.which("pg_ctl") or max(map(str, Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")), default=None)
    if folder is None or (os.geteuid() == 0 and not shutil.which("setpriv")):
        pytest.skip("needs PostgreSQL, and a user that is not root to start it")
    bin_ = Path(folder).resolve().parent
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    home = Path(
        tempfile.mkdtemp(prefix="pg", dir="/tmp")
    )  # a path that another user reaches, and short, for the socket
    home.chmod(0o777)
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []

    def call(*command: str) -> None:
        subprocess.run([*nobody, *command], check=True, capture_output=True, text=True, timeout=120, cwd="/")

    call(str(bin_ / "initdb"), f"--pgdata={home}/data", "--username=mlflow", "--auth=trust")
    options = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={home} -c fsync=off"
    call(str(bin_ / "pg_ctl"), f"--pgdata={home}/data", f"--log={home}/log", f"--options={options}", "--wait", "start")
    try:
        env = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}", "PGHOST": "127.0.0.1", "PGPORT": str(port)}
        psql(env, "postgres", "CREATE DATABASE mlflow")
        psql(env, "postgres", (MLFLOW / "databases.sql").read_text())
        yield env
    finally:
        call(str(bin_ / "pg_ctl"), f"--pgdata={home}/data", "--mode=immediate", "stop")
        shutil.rmtree(home)


def psql(env: dict[str, str], database: str, command: str) -> str:
    done = subprocess.run(["psql", "--username=mlflow", "--no-align", "--tuples-only", database], input=command,
                          env=env, capture_output=True, text=True, check=True, timeout=60)  # fmt: skip
    return done.stdout.strip()


def test_a_copy_of_the_database_comes_back(postgres: dict[str, str], moto_bucket: str, tmp_path: Path) -> None:
    """The commands of the two manifests, one after the other, by way of the bucket."""
    copies = tmp_path / "copies"
    copies.mkdir()

    def execute(container: dict[str, Any], date: str = "") -> None:
        command = [word.replace("/copies", str(copies)).replace("s3://BUCKET", moto_bucket).replace("DATE", date)
                   for word in container["command"]]  # fmt: skip
        if command[0] == "python":
            command[:2] = [sys.executable, str(MLFLOW / Path(command[1]).name)]
        subprocess.run(command, env=postgres, check=True, timeout=120, capture_output=True, text=True)

    for name in ("mlflow", "mlflow_auth"):
        psql(postgres, name, "CREATE TABLE kept (word text); INSERT INTO kept VALUES ('before')")
    backup = pod_of("production/mlflow", "CronJob", "mlflow-backup")["spec"]
    for container in (*backup["initContainers"], *backup["containers"]):
        execute(container)
    [date] = {file.stem.split("-", 1)[1] for file in copies.iterdir()}
    for file in list(copies.iterdir()):
        file.unlink()
    psql(postgres, "mlflow", "UPDATE kept SET word = 'lost'; CREATE TABLE since (n int)")
    psql(postgres, "mlflow_auth", "DROP TABLE kept")
    restore = pod_of("production/restore", "Job", "mlflow-restore")["spec"]
    for container in (*restore["initContainers"], *restore["containers"]):
        execute(container, date)
    assert [psql(postgres, name, "SELECT word FROM kept") for name in ("mlflow", "mlflow_auth")] == ["before"] * 2


def test_copies_are_made_and_read_by_the_servers_own_version() -> None:
    [image] = {
        container["image"] for container in pod_of("production/mlflow", "StatefulSet", "postgres")["spec"]["containers"]
    }
    dump = pod_of("production/mlflow", "CronJob", "mlflow-backup")["spec"]["initContainers"][0]["image"]
    restore = pod_of("production/restore", "Job", "mlflow-restore")["spec"]["containers"][0]["image"]
    assert image == dump == restore == COMPOSE["postgres"]["image"]


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
        "MLFLOW_JOBS_PASSWORD": "another",
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
    jobs_own_what_they_make(server, found, monkeypatch)
    search = f"{server}/api/2.0/mlflow/experiments/search?max_results=1"
    rebound = requests.get(search, headers={"Host": "evil.example"}, auth=("admin", PASSWORD), timeout=10)
    assert rebound.status_code == 403
    assert PASSWORD not in (tmp_path / "log").read_text()


def jobs_own_what_they_make(server: str, made_by_admin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The login of infra/mlflow/users.py writes into its own experiment, reads the others, and is no administrator."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.server import get_app_client

    def make(*managed: str) -> None:
        env = {**os.environ, "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD, "MLFLOW_JOBS_PASSWORD": "a-password-of-jobs"}
        command = [sys.executable, str(MLFLOW / "users.py"), server, *managed]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "a-password" not in done.stdout + done.stderr, done.stderr

    make()
    make()  # as after every start
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "jobs")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-password-of-jobs")
    client = MlflowClient(server)
    experiment = client.create_experiment("of-jobs")
    client.set_tag(client.create_run(experiment).info.run_id, "by", "jobs")
    client.create_registered_model("of-jobs")
    client.set_registered_model_tag("of-jobs", "by", "jobs")
    with pytest.raises(MlflowException, match=r"403|[Pp]ermission"):
        client.create_run(made_by_admin.experiment_id)
    with pytest.raises(MlflowException, match=r"403|[Pp]ermission"):
        get_app_client("basic-auth", tracking_uri=server).create_user("mallory", "a-password-of-mallory")
    make("experiment=tests")
    client.create_run(made_by_admin.experiment_id)
