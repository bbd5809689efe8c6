"""Ray, joined or started here: in one way for every job. Ray is imported late, since configurations ask here too."""

from __future__ import annotations

import logging
import os
from typing import Any

from pipeline.errors import PipelineError


def in_submitted_job() -> bool:
    """Whether this process is the entry point of ``ray job submit``."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def address_of(given: str | None) -> str | None:
    """The cluster to join: the one that is given, or the submitted job's; None: start Ray here."""
    return given or ("auto" if in_submitted_job() else None)


def join(address: str, key: str, **options: Any) -> None:
    """Join a cluster. ``key`` of the configuration is what gave its address.

    Raises:
        PipelineError: no cluster answers.
    """
    import ray

    try:
        ray.init(address=address, logging_level=logging.WARNING, **options)
    except (ConnectionError, RuntimeError) as error:
        raise PipelineError(f"{key}={address}: no Ray cluster answers there ({error})") from error


def start_here(cpus: int | None, object_store_mb: int, **options: Any) -> None:
    """Start Ray on this machine. It listens on loopback only, and needs no token."""
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        address="local", num_cpus=cpus, object_store_memory=object_store_mb * 2**20, include_dashboard=False,
        logging_level=logging.WARNING, **options,
    )  # fmt: skip
