"""Ray starting while a job imports what it needs: the one mostly waits, the other computes, and both take seconds."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.config import Config, validate
from pipeline.errors import PipelineError
from pipeline.training.beforehand import Beforehand
from pipeline.training.cluster import in_submitted_job, start_ray
from pipeline.training.config import Cluster

HEAVY = ("torch", "pandas", "pyarrow")  # without Ray, which would meet itself half imported


@contextmanager
def started_early(raw: Config) -> Iterator[None]:
    """Within, Ray runs for a composed configuration of ``jobs.train``, if it is this machine's to start.

    What is wrong with the configuration is left to those who check it.
    """
    cluster = _own_cluster(raw)
    if cluster is None:
        yield
        return
    imports = threading.Thread(target=lambda: [importlib.import_module(name) for name in HEAVY], name="imports")
    imports.start()
    processes = Beforehand(cluster.workers)
    try:
        start_ray(cluster)
        processes.start()
        imports.join()
        yield
    finally:
        processes.close()


def _own_cluster(raw: Config) -> Cluster | None:
    if raw.get("resume") or in_submitted_job():  # a resumed run has its own configuration, a submitted job its cluster
        return None
    try:
        cluster = validate(Cluster, raw["cluster"])
    except (PipelineError, KeyError):
        return None
    return None if cluster.address else cluster
