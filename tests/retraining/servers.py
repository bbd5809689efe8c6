"""Real servers for a test: MLflow's, on SQLite or on a PostgreSQL that the test starts itself."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.cluster.conftest import free_ports

START_SECONDS = 300


@contextmanager
def postgresql() -> Iterator[str]:
    """URI of an empty database on a server of its own; skips, and says why, where PostgreSQL is not installed."""
    folder = _binaries()
    if folder is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    if importlib.util.find_spec("psycopg2") is None:
        pytest.skip("the package psycopg2-binary is not installed, by which MLflow reaches PostgreSQL")
    how = _as_nobody()  # PostgreSQL refuses to run as root
    with tempfile.TemporaryDirectory(prefix="postgresql", dir="/tmp", ignore_cleanup_errors=True) as place:
        if how:
            os.chown(place, how["user"], how["group"])
        data, [port] = f"{place}/data", free_ports(1)
        make = [folder / "initdb", "--pgdata", data, "--username=pipeline", "--auth=trust", "--no-sync"]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL, cwd=place, **how)
        serve = [
            folder / "postgres", "-D", data, "-p", str(port), "-k", place, "-c", "listen_addresses=127.0.0.1",
            "-c", "fsync=off",
        ]  # fmt: skip
        log, where = Path(place, "log"), ["-h", "127.0.0.1", "-p", str(port), "-U", "pipeline"]
        with log.open("wb") as output:
            server = subprocess.Popen(serve, stdout=output, stderr=output, cwd=place, **how)
        try:
            _until(lambda: subprocess.run([folder / "pg_isready", "-q", *where]).returncode == 0, log)
            subprocess.run([folder / "createdb", *where, "mlflow"], check=True)
            yield f"postgresql+psycopg2://pipeline@127.0.0.1:{port}/mlflow"
        finally:
            server.send_signal(signal.SIGINT)  # ends without waiting for its clients
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(30)
            server.kill()
            server.wait()


@contextmanager
def mlflow_server(backend: str, folder: Path) -> Iterator[str]:
    """URI of an MLflow server that keeps runs and models in ``backend``, and files in ``folder``."""
    [port] = free_ports(1)
    uri, log = f"http://127.0.0.1:{port}", folder / "server.log"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", backend, "--artifacts-destination", str(folder / "served"),
    ]  # fmt: skip
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        _until(lambda: requests.get(f"{uri}/health", timeout=5).ok, log)
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # the group is this server's own session
        server.wait()


def _binaries() -> Path | None:
    """The folder with the programs of the newest PostgreSQL; Debian keeps them off the path."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("initdb")
    if found:
        places.append(Path(found).resolve().parent)
    wanted = ("initdb", "postgres", "pg_isready", "createdb")
    return next((place for place in places if all((place / name).exists() for name in wanted)), None)


def _as_nobody() -> dict[str, Any]:
    """For ``subprocess``: another user, where this one is root."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam("nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _until(ready: Any, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.RequestException):
            if ready():
                return
        time.sleep(0.25)
    raise RuntimeError(log.read_text(errors="replace")[-2000:])
