"""Which MLflow store a configuration names. Without MLflow, which takes a second to import."""

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline import store
from pipeline.commands import command, from_anywhere, going_on
from pipeline.config import Section, usual_choice, validate
from pipeline.errors import PipelineError, Unavailable
from pipeline.files import in_uri
from pipeline.ray_start import in_submitted_job
from pipeline.registry.masking import mask, mask_text

TRY_LATER, NOT_REGISTERED = os.EX_TEMPFAIL, 6  # exit codes
_SQLITE, _SQLITE_BEGINS = "sqlite:///", b"SQLite format 3\0"
_HERE = ("127.0.0.1", "localhost", "::1", "0.0.0.0")


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
    path = sqlite_file(config.uri)
    if path is None:
        if not re.match(r"(https?|postgresql|mysql|mssql)(\+\w+)?://", config.uri):
            shown = mask_text(config.uri)
            raise PipelineError(f"tracking.uri={shown}: give sqlite:///FILE, http(s)://SERVER or a database's URI")
        return config.uri
    if not path.is_absolute() and in_submitted_job():
        raise PipelineError(
            f"tracking.uri={config.uri} is a relative path, which in a submitted job leads into a folder that is "
            "thrown away: give sqlite:////absolute/path, a server, or tracking=none"
        )
    path = path.resolve()
    if not make and not path.is_file():
        raise PipelineError(f"tracking.uri={config.uri}: there is no such file, and so no model; mend the path")
    if make:
        _check_file(path, config.uri)
    _, question, options = config.uri.partition("?")
    return f"{_SQLITE}{in_uri(str(path))}{question}{options}"


def sqlite_file(uri: str | None) -> Path | None:
    """The file that SQLAlchemy opens for the URI of a SQLite store, whose "%2F" it decodes; None: of another store."""
    if uri is None or not uri.startswith(_SQLITE):
        return None
    return Path(unquote(uri.removeprefix(_SQLITE).partition("?")[0]))


def _check_file(path: Path, uri: str) -> None:
    """Refuse a place where no SQLite file can be, or another file is; its folder is made."""
    store.check_output(str(path), "tracking.uri")
    if not path.exists():
        return
    with store.writing(f"tracking.uri={uri}", "file"), open(path, "r+b") as file:
        begins = file.read(len(_SQLITE_BEGINS))
    if begins and begins != _SQLITE_BEGINS:
        raise PipelineError(f"tracking.uri={uri}: this file is no SQLite database; give another file")


def check_model_name(name: str | None) -> None:
    """Refuse a name under which no model can be registered; None: it is to be registered nowhere."""
    if name is not None and not re.fullmatch(r"[\w .-]+", name):
        raise PipelineError(
            f"register_as={name!r}: a model's name is made of letters, digits, '.', '_', '-' and spaces"
        )


def check_tracking(tracking: Mapping[str, Any], register_as: str | None = None) -> None:
    """Refuse a configuration that can never work, without reaching for a store elsewhere.

    Raises:
        Unavailable: in a submitted job, no server listens on this very machine, which was named: it may be away.
        PipelineError: whatever else is wrong.
    """
    config = validate(TrackingConfig, dict(tracking))
    if config.uri is None:
        return
    check_model_name(register_as)
    store_uri(config)
    if config.artifacts is not None and os.path.isabs(config.artifacts):
        store.check_folder(config.artifacts, "tracking.artifacts")
    server = urlsplit(config.uri)
    if in_submitted_job() and server.scheme in ("http", "https") and server.hostname in _HERE:
        port = server.port or (443 if server.scheme == "https" else 80)
        try:
            socket.create_connection((server.hostname, port), timeout=5).close()
        except OSError as error:
            raise Unavailable(  # whoever has a server on this machine names it so, and it may be away
                f"tracking.uri={mask_text(config.uri)}: in a submitted job this is the machine of the job, where no "
                "MLflow server listens; try again when it is back, or give tracking.uri=http://SERVER:5000, or "
                "MLFLOW_TRACKING_URI in its env_vars"
            ) from error


def naming(tracking: Mapping[str, Any]) -> list[str]:
    """The arguments of a job that name the store of ``tracking``, where they are not the usual ones; a store in a local
    file always, since which one is usual goes by the folder and by PIPELINE_HOME. A login in its URI is not shown."""
    usual, given = usual_choice("tracking", "embedded"), from_anywhere(tracking)
    if sqlite_file(given.get("uri")) is not None:
        usual = {key: value for key, value in usual.items() if key not in ("uri", "artifacts")}
    named = {key: value for key, value in given.items() if value is not None and value != usual.get(key)}
    return [f"tracking.{key}={mask(value, key)}" for key, value in named.items()]


def registering(run: str, tracking: Mapping[str, Any], register_as: str | None = None) -> str:
    """The command that brings a run's folder to the MLflow store of ``tracking``; ``register_as``: under another name
    than the run's own."""
    name = [] if register_as is None else [f"register_as={register_as}"]
    return going_on(command("register", f"run={run}", *name, *naming(tracking)))


def say_undelivered(error: PipelineError) -> dict[str, Any]:
    """What a job's summary has of a model that was to be registered and is not; says so.

    The run itself is whole, and the job ends with a status of its own: that of ``Unavailable`` where it may work later.
    """
    print(f"not registered: {error}", flush=True)
    return {"undelivered": str(error), "exit_code": TRY_LATER if isinstance(error, Unavailable) else NOT_REGISTERED}
