"""One retraining of a model at a time, on any machine, and none that waits for a dead one."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from mlflow import MlflowClient

from pipeline.errors import PipelineError
from pipeline.registry import locks
from pipeline.registry.tracking import STORE_ERRORS, connect, reaching


class Busy(PipelineError):
    """Another retraining of the model is under way."""


@contextmanager
def lease(tracking: Mapping[str, Any], name: str, seconds: float) -> Iterator[Callable[[], None]]:
    """Hold the model's lease, or raise Busy. What is yielded checks that it is still held.

    A thread gives signs of life; a holder on this machine whose process ended, and one elsewhere that was silent for
    ``seconds``, are dead.
    """
    lock, owner = f"{name}.retraining-lock", locks.new_owner()
    with reaching(tracking, "nothing was done; run again"):
        client = connect(tracking).client
        _take(client, lock, owner, name, seconds)
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(client, lock, ended, seconds / 5), name="lease", daemon=True)
    thread.start()

    def still_held() -> None:
        with reaching(tracking, "run again"):
            if locks.holder(client, lock)[0] != owner:
                raise Busy(f"another retraining of {name!r} took over from this one")

    try:
        yield still_held
    finally:
        ended.set()
        thread.join()
        with suppress(*STORE_ERRORS):  # the store is away: the lease runs out by itself
            locks.release(client, lock, owner)


def _take(client: MlflowClient, lock: str, owner: str, name: str, seconds: float) -> None:
    if _make(client, lock, owner):
        return
    holder, alive = locks.holder(client, lock)
    if holder is not None and not _is_dead(holder, alive, seconds):
        machine, process, _ = holder.split()
        raise Busy(
            f"another retraining of {name!r} is under way, on {machine} in process {process}; wait for it, or, if it "
            f"died, for {seconds:g} s"
        )
    if holder is not None and locks.holder(client, lock)[0] == holder:
        client.delete_registered_model(lock)
    if not _make(client, lock, owner):
        raise Busy(f"another retraining of {name!r} has just begun")
    time.sleep(1)  # somebody else who found the same dead holder may have deleted this lock as well
    if locks.holder(client, lock)[0] != owner:
        raise Busy(f"another retraining of {name!r} has just begun")


def _make(client: MlflowClient, lock: str, owner: str) -> bool:
    return locks.take(client, lock, owner, {locks.BEAT: str(time.time())})


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
            client.set_registered_model_tag(lock, locks.BEAT, str(time.time()))
        except STORE_ERRORS:
            continue  # away for a while
