"""Ray, joined or started here: in one way for every job. Ray is imported late, since configurations ask here too."""

import json
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from pipeline import ray_internals
from pipeline.errors import PipelineError, Unavailable

KNOCKS = 5  # at an address, a second apart: a head that is started again is away for a moment
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's own
_LOST = (
    "RuntimeEnvSetupError", "NodeDiedError", "WorkerCrashedError", "OwnerDiedError", "ActorDiedError",
    "ActorUnavailableError", "ObjectLostError", "LocalRayletDiedError",
)  # fmt: skip
_TOKEN = (
    "this cluster asks for its token, and was given none or another; give RAY_AUTH_MODE=token and "
    "RAY_AUTH_TOKEN_PATH=FILE in the environment"
)


def lost(error: Exception) -> str | None:
    """What to say of an error that is the cluster's own: a node, a worker or what it held is gone; else None."""
    ray = sys.modules.get("ray")
    if ray is None or isinstance(error, ray.exceptions.RayTaskError):  # what a task itself raised
        return None
    if not isinstance(error, tuple(getattr(ray.exceptions, name) for name in _LOST)):
        return None
    reason = " ".join(str(error).split()).partition(". ")[0][:200]
    return f"the cluster lost a node, a worker or what it held ({type(error).__name__}: {reason}); try again later"


def in_submitted_job() -> bool:
    """Whether this process is the entry point of ``ray job submit``."""
    return _JOB in os.environ


def address_of(given: str | None) -> str | None:
    """The cluster to join: the one that is given, or the submitted job's; None: start Ray here."""
    return given or ("auto" if in_submitted_job() else None)


def join(address: str, key: str, variables: Mapping[str, str] | None = None, **options: Any) -> None:
    """Join a cluster. ``key`` of the configuration is what gave its address.

    ``variables`` go into the environment of its processes, without those that the submitted job has given already:
    Ray refuses to be told twice.

    Raises:
        Unavailable: no cluster answers.
        PipelineError: it asks for a token, or refuses. No message has the value of a variable.
    """
    import ray

    given = _job_variables()
    new = {name: value for name, value in (variables or {}).items() if name not in given}
    if new:
        options["runtime_env"] = {"env_vars": new}
    _knock(address, key)
    try:
        ray.init(address=address, logging_level=logging.WARNING, **options)
    except ray.exceptions.AuthenticationError as error:
        raise PipelineError(f"{key}={address}: {_TOKEN}") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = _without_values(" ".join(str(error).split()), {**given, **new})
        tried = re.search(r"Failed to connect to Ray cluster at (\S+)", reason)
        if tried and ray_internals.asks_for_token(tried[1]):
            raise PipelineError(f"{key}={address}: {_TOKEN}") from None
        if isinstance(error, ValueError):
            raise PipelineError(f"{key}={address}: Ray refuses ({reason})") from None
        raise Unavailable(f"{key}={address}: no Ray cluster answers there ({reason})") from None


def _job_variables() -> dict[str, str]:
    """Of ``ray job submit --runtime-env-json '{"env_vars": ...}'``."""
    job = json.loads(os.environ.get(_JOB) or "{}")
    return dict((job.get("runtime_env") or {}).get("env_vars") or {})


def _without_values(text: str, variables: Mapping[str, str]) -> str:
    for value in sorted(map(str, variables.values()), key=len, reverse=True):
        if len(value) > 1:  # a single digit tells nothing, and is in every address
            text = text.replace(value, "***")
    return text


def _knock(address: str, key: str) -> None:
    """Refuse in seconds an address where nobody listens: Ray asks for minutes, and then ends the process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        return
    for attempt in range(KNOCKS):
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if attempt == KNOCKS - 1:
                reason = error.strerror or str(error)
                raise Unavailable(f"{key}={address}: no Ray cluster answers there ({reason})") from error
            time.sleep(1)


def start_here(cpus: int | None, object_store_mb: int, **options: Any) -> None:
    """Start Ray on this machine. It listens on loopback only, and needs no token.

    Raises:
        PipelineError: Ray refuses what it is given.
        Unavailable: its processes do not start in time.
    """
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        ray.init(
            address="local", num_cpus=cpus, object_store_memory=object_store_mb * 2**20, include_dashboard=False,
            logging_level=logging.WARNING, **options,
        )  # fmt: skip
    except ValueError as error:
        raise PipelineError(f"Ray cannot start here: {' '.join(str(error).split())}") from error
    except Exception as error:  # Ray's own kind, for a process of it that did not come in time
        ray.shutdown()
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise Unavailable(
            f"Ray did not start on this machine ({reason}): it is busy, or short of memory or disk; try again"
        ) from error
