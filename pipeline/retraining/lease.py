"""One retraining of a model at a time, on any machine, and none that waits for a dead one."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.errors import PipelineError
from pipeline.registry.tracking import STORE_ERRORS, connect, reaching

BEAT = "pipeline.heartbeat"


class Busy(PipelineError):
    """Another retraining of the model is under way."""


@contextmanager
def lease(tracking: Mapping[str, Any], name: str, seconds: float) -> Iterator[Callable[[], None]]:
    """Hold the model's lease, or raise Busy. What is yielded checks that it is still held.

    As with promotions the lock is a registered model, whose name the store allows once. A thread gives signs of life;
    a holder on this machine whose process ended, and one elsewhere that was silent for ``seconds``, are dead.
    """
    lock, owner = f"{name}.retraining-lock", f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
    with reaching(tracking, "nothing was done; run again"):
        client = connect(tracking).client
        _take(client, lock, owner, name, seconds)
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(client, lock, ended, seconds / 5), name="lease", daemon=True)
    thread.start()

    def still_held() -> None:
        with reaching(tracking, "run again"):
            if _holder(client, lock)[0] != owner:
                raise Busy(f"another retraining of {name!r} took over from this one")

    try:
        yield still_held
    finally:
        ended.set()
        thread.join()
        try:
            if _holder(client, lock)[0] == owner:
                client.delete_registered_model(lock)
        except STORE_ERRORS:
            pass  # the store is away: the lease runs out by itself


def _take(client: MlflowClient, lock: str, owner: str, name: str, seconds: float) -> None:
    if _make(client, lock, owner):
        return
    holder, alive = _holder(client, lock)
    if holder is not None and not _is_dead(holder, alive, seconds):
        machine, process, _ = holder.split()
        raise Busy(
            f"another retraining of {name!r} is under way, on {machine} in process {process}; wait for it, or, if it "
            f"died, for {seconds:g} s"
        )
    if holder is not None and _holder(client, lock)[0] == holder:
        client.delete_registered_model(lock)
    if not _make(client, lock, owner):
        raise Busy(f"another retraining of {name!r} has just begun")
    time.sleep(1)  # somebody else who found the same dead holder may have deleted this lock as well
    if _holder(client, lock)[0] != owner:
        raise Busy(f"another retraining of {name!r} has just begun")


def _make(client: MlflowClient, lock: str, owner: str) -> bool:
    try:
        client.create_registered_model(lock, tags={BEAT: str(time.time())}, description=owner)
        return True
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return False


def _holder(client: MlflowClient, lock: str) -> tuple[str | None, float]:
    """Who holds a lease, and when it gave its last sign of life, in seconds since 1970."""
    try:
        found = client.get_registered_model(lock)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None, 0.0
    return found.description, float(found.tags.get(BEAT, found.creation_timestamp / 1000))


def _is_dead(holder: str, alive: float, seconds: float) -> bool:
    machine, process, _ = holder.split()
    if machine == socket.gethostname():
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return time.time() - alive > seconds


def _beat(client: MlflowClient, lock: str, ended: threading.Event, pause: float) -> None:
    while not ended.wait(pause):
        try:
            client.set_registered_model_tag(lock, BEAT, str(time.time()))
        except STORE_ERRORS:
            continue  # away for a while
