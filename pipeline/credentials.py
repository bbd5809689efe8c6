"""Logins stay in the environment and in mounted files: a configuration, which is stored and shown, never holds one."""

import re
from collections.abc import MutableMapping, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.errors import PipelineError

URI, USERNAME, PASSWORD = "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
_LOGIN = re.compile(r"://[^/\s@]*:[^/\s@]+@")
_QUERY = re.compile(r"://\S*[?&;](password|passwd|pwd|sslpassword|token|access_token|secret_key)=[^&;\s]", re.I)


def split_login(environment: MutableMapping[str, str]) -> None:
    """Turn ``https://user:password@server`` in MLFLOW_TRACKING_URI into the address and the two variables that MLflow
    takes a login from. Variables that are set already go first."""
    uri = environment.get(URI, "")
    if not _LOGIN.search(uri) or not uri.startswith(("http://", "https://")):
        return
    parts = urlsplit(uri)
    environment.setdefault(USERNAME, unquote(parts.username or ""))
    environment.setdefault(PASSWORD, unquote(parts.password or ""))
    environment[URI] = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def refuse_logins(arguments: Sequence[str], config: Any = None) -> None:
    """Refuse a login on the command line or in the configuration, in an address or among its parameters, without
    repeating it.

    Raises:
        PipelineError: names the key, and where the login belongs.
    """
    for argument in arguments:
        if _holds_login(argument):
            _refuse(argument.partition("=")[0])
    _search(config, "")


def _search(value: Any, key: str) -> None:
    if isinstance(value, dict):
        for name, part in value.items():
            _search(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for part in value:
            _search(part, key)
    elif isinstance(value, str) and _holds_login(value):
        _refuse(key)


def _holds_login(text: str) -> bool:
    return _LOGIN.search(text) is not None or _QUERY.search(text) is not None


def _refuse(key: str) -> None:
    raise PipelineError(
        f"{key} holds a password, and a configuration is stored with the run: give the address alone, and the login by "
        f"{USERNAME} and {PASSWORD} or ~/.mlflow/credentials (of a PostgreSQL: PGPASSWORD or ~/.pgpass)"
    )
