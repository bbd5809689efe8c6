"""Locks that live in the tracking store, so that they hold between machines.

A lock is a registered model: its name is unique in every MLflow store, and making one that is there is refused by the
store itself. Its description says who holds it.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

BEAT = "pipeline.heartbeat"  # tag: the holder's last sign of life, where it gives any


def new_owner() -> str:
    """A name that nobody else has: "MACHINE PROCESS RANDOM"."""
    return f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"


def take(client: MlflowClient, lock: str, owner: str, tags: Mapping[str, str] | None = None) -> bool:
    """Take a lock that is free; False where somebody holds it."""
    try:
        client.create_registered_model(lock, tags=dict(tags or {}), description=owner)
        return True
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return False


def holder(client: MlflowClient, lock: str) -> tuple[str | None, float]:
    """Who holds a lock, and when it was taken or its holder last gave a sign of life, in seconds since 1970."""
    try:
        found = client.get_registered_model(lock)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None, 0.0
    return found.description, float(found.tags.get(BEAT, found.creation_timestamp / 1000))


def release(client: MlflowClient, lock: str, owner: str) -> None:
    """Give a lock back, unless somebody else has it by now."""
    if holder(client, lock)[0] == owner:
        client.delete_registered_model(lock)
