"""Which MLflow store a configuration names. Without MLflow, which takes a second to import."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import Section, validate
from pipeline.errors import PipelineError
from pipeline.ray_start import in_submitted_job
from pipeline.registry.masking import mask_text

_SQLITE = "sqlite:///"


class TrackingConfig(Section):
    """Keys of the ``tracking`` group; ``conf/tracking`` explains them."""

    uri: str | None
    artifacts: str | None
    experiment: str
    timeout: int | float


def store_uri(config: TrackingConfig) -> str:
    """The store's URI; a SQLite file's path made absolute and its folder made."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"{_SQLITE}{path}"


def check_tracking(tracking: Mapping[str, Any]) -> None:
    """Refuse a configuration that can never work, without reaching for the store."""
    config = validate(TrackingConfig, dict(tracking))
    if config.uri is not None:
        store_uri(config)
