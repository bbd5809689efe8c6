"""One job at a time in the folder of a run or a campaign: of two that go on with it at once, one is refused.

What holds it ends with the process, however that ends, so that nothing is left behind by a crash: a lock of the file
system, or, where that has none and in an object store, an actor of the cluster that has the folder's name.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from pipeline import store
from pipeline.errors import Unavailable

LOCK = ".lock"
LEAVES_S = 10.0  # until the actor of a job that has just ended is gone


@ray.remote(num_cpus=0)
class _Holder:
    """Its name is all there is to it."""


@contextmanager
def alone(uri: str, what: str) -> Iterator[None]:
    """Be the only job in the folder ``uri``, on this file system or in this cluster, which has been joined.

    Raises:
        Unavailable: another job is in it.
    """
    refusal = Unavailable(f"{what}: another job is at work in {uri}; wait for its end, or end it, and try again")
    if not store.is_remote(uri):
        path = os.path.join(store.open_store(uri)[1], LOCK)
        with store.writing(uri, "storage"):
            file = open(path, "ab")  # noqa: SIM115  # closed below
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise refusal from None
            except OSError:  # a file system without locks
                pass
            else:
                yield
                return
    holder = _named(uri)
    if holder is None:
        raise refusal
    try:
        yield
    finally:
        ray.kill(holder)


def _named(uri: str) -> ray.actor.ActorHandle | None:
    """An actor of this name; None where there is another one."""
    deadline = time.monotonic() + LEAVES_S
    while True:
        try:
            return _Holder.options(name=uri, namespace="pipeline.alone").remote()  # type: ignore[attr-defined]
        except ValueError:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.5)
