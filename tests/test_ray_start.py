"""Joining a cluster: what a submitted job has is not said again, and what goes wrong is one line without a secret."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest
import ray

from pipeline import ray_internals, ray_start
from pipeline.config import compose, validate
from pipeline.errors import PipelineError, Unavailable
from pipeline.training import cluster
from pipeline.training.config import Cluster

SECRET, REGION = "wJalrXUtnFEMI/K7MDENG", "us-west-2"
ADDRESS = "auto"  # where nobody knocks


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray starts the entry point of a job that was submitted with variables."""
    variables = {"AWS_REGION": REGION, "AWS_SECRET_ACCESS_KEY": SECRET}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": variables}}))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def started(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> dict[str, Any]:
    """What ``ray.init`` is given, which ends with ``error``."""
    given: dict[str, Any] = {}

    def init(**options: Any) -> None:
        given.update(options)
        if error is not None:
            raise error

    monkeypatch.setattr(ray, "init", init)
    return given


@pytest.mark.usefixtures("submitted")
def test_variables_that_the_job_has_are_not_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    given = started(monkeypatch)
    for name, value in cluster.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    cluster.start_ray(validate(Cluster, compose("train")["cluster"]))
    assert given["address"] == "auto"
    variables = given["runtime_env"]["env_vars"]
    assert variables["AWS_ENDPOINT_URL"] == "http://store:9000" and cluster.ENVIRONMENT.keys() <= variables.keys()
    assert not {"AWS_REGION", "AWS_SECRET_ACCESS_KEY"} & variables.keys()


def test_ray_agrees_that_nothing_is_said_twice() -> None:
    """The fault as Ray has it: one variable in both is refused, and its message has all values."""
    from ray._private.worker import _merge_runtime_env

    job = {"env_vars": {"AWS_REGION": REGION}}
    assert _merge_runtime_env(job, {"env_vars": {"AWS_REGION": REGION}}, override=False) is None
    assert _merge_runtime_env(job, {"env_vars": {"PIPELINE_CACHE": "/cache"}}, override=False) is not None


@pytest.mark.usefixtures("submitted")
@pytest.mark.parametrize("kind", [ValueError, RuntimeError, ConnectionError])
def test_no_message_holds_the_value_of_a_variable(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    text = f"Failed to merge the Job's runtime env {{'env_vars': {{'KEY': '{SECRET}'}}}}\nwith {{'P': '/private'}}"
    started(monkeypatch, kind(text))
    with pytest.raises(PipelineError) as error:
        ray_start.join(ADDRESS, "cluster.address", {"P": "/private"})
    said = str(error.value)
    assert SECRET not in said and "/private" not in said and "\n" not in said and "***" in said
    assert error.value.__suppress_context__  # nor does its traceback, where a program shows it
    assert isinstance(error.value, Unavailable) is (kind is not ValueError)


@pytest.mark.parametrize(
    "error",
    [ray.exceptions.AuthenticationError("no token"), ConnectionError("Failed to connect to Ray cluster at head:6379")],
)
def test_a_missing_token_is_said_so(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    started(monkeypatch, error)
    monkeypatch.setattr(ray_internals, "asks_for_token", lambda address: address == "head:6379")
    with pytest.raises(PipelineError, match=r"^cluster.address=auto: this cluster asks for its token") as refusal:
        ray_start.join(ADDRESS, "cluster.address")
    assert not isinstance(refusal.value, Unavailable)


def test_an_address_where_nobody_listens_is_refused_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    given = started(monkeypatch)
    monkeypatch.setattr(ray_start, "KNOCKS", 2)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(Unavailable, match=rf"^cluster.address={address}: no Ray cluster answers there"):
            ray_start.join(address, "cluster.address")
        assert time.monotonic() - began < 20 and not given
        listening.listen()
        ray_start.join(address, "cluster.address")
        assert given["address"] == address
