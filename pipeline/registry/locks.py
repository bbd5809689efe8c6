"""Locks that live in the tracking store, so that they hold between machines.

A held lock is an experiment with the lock's name: names of experiments are unique, and the store itself refuses to make
one that is there. Whoever releases a lock, or takes it from a dead process, renames that experiment by its number and
deletes it. A number is never given twice, so of many who find the same dead holder none can remove its successor.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException

from pipeline.errors import PipelineError
from pipeline.registry.tracking import STORE_ERRORS

OWNER, BEAT = "pipeline.owner", "pipeline.heartbeat"  # tags: "MACHINE PROCESS", and the last sign of life, as seconds
PAUSE = 0.2  # seconds between two attempts
_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE")  # somebody else removed it already


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    number: str  # of the experiment
    machine: str
    process: int
    alive: float  # last sign of life, seconds since 1970

    def is_dead(self, stale: float) -> bool:
        """Silent for ``stale`` seconds, or a process of this machine that ended."""
        ended = self.machine == socket.gethostname() and not psutil.pid_exists(self.process)
        return ended or time.time() - self.alive > stale


class Taken(PipelineError):
    """Another process holds the lock."""

    def __init__(self, holder: Holder | None) -> None:
        where = f"on {holder.machine} in process {holder.process}" if holder else "just begun"
        super().__init__(where)


@contextmanager
def locked(client: MlflowClient, lock: str, stale: float, wait: float = 0.0) -> Iterator[Callable[[], bool]]:
    """Hold a lock; what is yielded tells whether it is still held. A thread gives signs of life meanwhile.

    Args:
        stale: seconds of silence after which a holder counts as dead, and loses the lock.
        wait: seconds to wait for a lock that is held.

    Raises:
        Taken: somebody else holds it.
    """
    deadline = time.monotonic() + wait
    while (number := _take(client, lock, stale)) is None:
        if time.monotonic() >= deadline:
            raise Taken(holder_of(client, lock))
        time.sleep(PAUSE)
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(client, number, ended, stale / 5), name="lock", daemon=True)
    thread.start()

    def still_held() -> bool:
        holder = holder_of(client, lock)
        return holder is not None and holder.number == number

    try:
        yield still_held
    finally:
        ended.set()
        thread.join()
        with suppress(*STORE_ERRORS):  # the store is away: the lock goes stale by itself
            _remove(client, lock, number)


def holder_of(client: MlflowClient, lock: str) -> Holder | None:
    """Who holds a lock; None: nobody."""
    found = client.get_experiment_by_name(lock)
    if found is None:
        return None
    machine, _, process = found.tags.get(OWNER, "unknown 0").rpartition(" ")
    deleted = found.lifecycle_stage != "active"  # by hand: whoever did so wants it gone
    alive = 0.0 if deleted else float(found.tags.get(BEAT, 0.0))
    return Holder(found.experiment_id, machine, int(process), alive)


def _take(client: MlflowClient, lock: str, stale: float) -> str | None:
    """Take a lock that is free, or whose holder died; its number, or None."""
    tags = {OWNER: f"{socket.gethostname()} {os.getpid()}", BEAT: str(time.time())}
    while True:
        try:
            return client.create_experiment(lock, tags=tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        holder = holder_of(client, lock)
        if holder is None or not holder.is_dead(stale):
            return None
        _remove(client, lock, holder.number)


def _remove(client: MlflowClient, lock: str, number: str) -> None:
    """Remove the experiment that is a lock, unless it has been removed."""
    try:
        found: Experiment = client.get_experiment(number)
        if found.name != lock:
            return
        if found.lifecycle_stage != "active":  # its name is taken as long as it has it
            client.restore_experiment(number)
        client.rename_experiment(number, f"{lock} {number}")
        client.delete_experiment(number)
    except MlflowException as error:
        if error.error_code not in _GONE:
            raise


def _beat(client: MlflowClient, number: str, ended: threading.Event, pause: float) -> None:
    while not ended.wait(pause):
        with suppress(*STORE_ERRORS):  # away for a while
            client.set_experiment_tag(number, BEAT, str(time.time()))
