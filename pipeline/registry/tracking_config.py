"""Which MLflow store a configuration names. Without MLflow, which takes a second to import."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.commands import command
from pipeline.config import Section, usual_choice, validate
from pipeline.errors import PipelineError, Unavailable
from pipeline.ray_start import in_submitted_job
from pipeline.registry.masking import mask, mask_text

TRY_LATER, NOT_REGISTERED = os.EX_TEMPFAIL, 6  # exit codes
_SQLITE = "sqlite:///"


class TrackingConfig(Section):
    """Keys of the ``tracking`` group; ``conf/tracking`` explains them."""

    uri: str | None
    artifacts: str | None
    experiment: str
    timeout: int | float


def store_uri(config: TrackingConfig, make: bool = True) -> str:
    """The store's URI; a SQLite file's path made absolute and its folder made.

    Args:
        make: whether a SQLite file may be made; else it must be there.
    """
    if config.uri is None:
        raise PipelineError("tracking.uri is null: there is no MLflow store; give tracking=embedded or tracking=server")
    if not config.uri.startswith(_SQLITE):
        if not re.match(r"(https?|postgresql|mysql|mssql)(\+\w+)?://", config.uri):
            shown = mask_text(config.uri)
            raise PipelineError(f"tracking.uri={shown}: give sqlite:///FILE, http(s)://SERVER or a database's URI")
        return config.uri
    path = Path(config.uri.removeprefix(_SQLITE))
    if not path.is_absolute() and in_submitted_job():
        raise PipelineError(
            f"tracking.uri={config.uri} is a relative path, which in a submitted job leads into a folder that is "
            "thrown away: give sqlite:////absolute/path, a server, or tracking=none"
        )
    path = path.resolve()
    if not make and not path.is_file():
        raise PipelineError(f"tracking.uri={config.uri}: there is no such file, and so no model; mend the path")
    if make:
        path.parent.mkdir(parents=True, exist_ok=True)
    return f"{_SQLITE}{path}"


def check_tracking(tracking: Mapping[str, Any]) -> None:
    """Refuse a configuration that can never work, without reaching for a store elsewhere."""
    config = validate(TrackingConfig, dict(tracking))
    if config.uri is None:
        return
    store_uri(config)
    server = urlsplit(config.uri)
    if in_submitted_job() and server.scheme in ("http", "https") and server.hostname in ("127.0.0.1", "localhost"):
        port = server.port or (443 if server.scheme == "https" else 80)
        try:
            socket.create_connection((server.hostname, port), timeout=5).close()
        except OSError as error:
            raise PipelineError(
                f"tracking.uri={mask_text(config.uri)}: in a submitted job this is the machine of the job, where no "
                "MLflow server listens; give tracking.uri=http://SERVER:5000, or MLFLOW_TRACKING_URI in its env_vars"
            ) from error


def registering(run: str, tracking: Mapping[str, Any]) -> str:
    """The command that brings a run's folder to the MLflow store of ``tracking``, which it names where it is not the
    usual one. A login in its URI is not shown."""
    usual = usual_choice("tracking", "embedded")
    given = {key: value for key, value in tracking.items() if value is not None and value != usual.get(key)}
    return command("register", f"run={run}", *(f"tracking.{key}={mask(value, key)}" for key, value in given.items()))


def say_undelivered(error: PipelineError) -> dict[str, Any]:
    """What a job's summary has of a model that was to be registered and is not; says so.

    The run itself is whole, and the job ends with a status of its own: that of ``Unavailable`` where it may work later.
    """
    print(f"not registered: {error}", flush=True)
    return {"undelivered": str(error), "exit_code": TRY_LATER if isinstance(error, Unavailable) else NOT_REGISTERED}
