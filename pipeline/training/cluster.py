"""Ray, started here or joined; and what a run needs, compared with what the cluster can give, before it waits."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from pipeline import ray_internals
from pipeline.data.planners import TASK_CPUS
from pipeline.errors import PipelineError, Unavailable
from pipeline.ray_start import address_of, join, start_here
from pipeline.training.allocator import ALLOCATOR
from pipeline.training.config import Cluster

ENVIRONMENT = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONWARNINGS": "ignore::DeprecationWarning,ignore::FutureWarning,ignore::UserWarning",
    **ALLOCATOR,
}
# Where the store is, which every node must know. Secrets are not sent: nodes have a role or their own environment.
PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "PIPELINE_CACHE")
# For the processes of a Ray without a dashboard: nobody listens here. Ray Train's PlacementGroupCleaner asks the
# dashboard whether the run's controller lives: it would look for one for 12 s at the end of every run, and is refused
# at once instead. A Ray that was started for a run takes everything with it, so that there is nothing to clean.
WITHOUT_DASHBOARD = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
START_TIMEOUT_S = "120"  # how long a worker group may wait for resources that an autoscaler brings


def start_ray(cluster: Cluster) -> None:
    """Join the cluster of ``cluster.address`` (or of the submitted job), or start Ray on this machine.

    Does nothing where Ray runs in this process already. Ray's token authentication is set either way: a cluster's
    mode is taken from ``RAY_AUTH_MODE``; a Ray of this machine's own listens on loopback and needs no token.
    """
    if ray.is_initialized():
        return
    os.environ.update({key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()})
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_TIMEOUT_S)
    output, address = cluster.worker_output, address_of(cluster.address)
    if address:
        variables = {key: os.environ[key] for key in (*ENVIRONMENT, *PASSED_ON) if key in os.environ}
        join(address, "cluster.address", variables, log_to_driver=output)
        return
    cores = os.cpu_count() or 1
    wanted = cluster.workers * cluster.cpus_per_worker
    if wanted > cores:
        raise PipelineError(
            f"cluster.workers={cluster.workers} of cluster.cpus_per_worker={cluster.cpus_per_worker:g} need "
            f"{wanted:g} cores; this machine has {cores}: lower one of them, or give a cluster.address"
        )
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody reclaims this machine
    with _environment(WITHOUT_DASHBOARD):  # Ray's processes inherit it
        # One more than there are: tasks beside the workers compute for milliseconds, and share their cores.
        start_here(cores + 1, cluster.object_store_mb, log_to_driver=output)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def check_resources(cluster: Cluster, decoding: bool = False) -> None:
    """Refuse what the cluster cannot give now and its autoscaler cannot bring: it would be waited for without end.

    ``decoding``: whether Ray Data decodes images beside the workers (``materialize=cluster``), which takes a CPU.

    Raises:
        Unavailable: a node of a cluster that was joined, and does not grow, may be away just now.
        PipelineError: there will never be so much.
    """
    limits = capacity()
    may_come = address_of(cluster.address) is not None and not ray_internals.autoscaler_limits()
    refusal = Unavailable if may_come else PipelineError
    cpus, gpus = limits.get("CPU", 0.0), limits.get("GPU", 0.0)
    need_cpus, need_gpus = cluster.workers * cluster.cpus_per_worker, cluster.workers * cluster.gpus_per_worker
    if need_gpus > gpus:
        raise refusal(
            f"cluster.workers={cluster.workers} of cluster.gpus_per_worker={cluster.gpus_per_worker:g} need "
            f"{need_gpus:g} GPUs; the cluster has {gpus:g}: lower one of them, or choose cluster=local to train on CPUs"
        )
    if need_cpus > cpus:
        raise refusal(
            f"cluster.workers={cluster.workers} of cluster.cpus_per_worker={cluster.cpus_per_worker:g} need "
            f"{need_cpus:g} CPUs; the cluster has {cpus:g}: lower one of them"
        )
    if decoding and need_cpus + TASK_CPUS > cpus:
        raise PipelineError(
            f"the workers take all {cpus:g} CPUs of the cluster and leave none for Ray Data, which gathers the pixels: "
            f"set cluster.cpus_per_worker so that {TASK_CPUS:g} CPU is left, or materialize=worker"
        )


def capacity() -> dict[str, float]:
    """The cluster's resources, or what its autoscaler may bring them to, whichever is more."""
    now = dict(ray.cluster_resources())
    later = ray_internals.autoscaler_limits()
    return {key: max(now.get(key, 0.0), float(later.get(key, 0.0))) for key in {*now, *later}}
