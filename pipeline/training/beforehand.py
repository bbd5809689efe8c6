"""The processes of Ray Train's controller and workers, started while the driver still imports and checks.

Ray Train gives them environment variables, so that those which Ray keeps ready are not theirs: they would start when
the run begins, one after the other, and each imports torch. Here Ray is asked for them as soon as it runs, and they
import what a worker needs (:mod:`pipeline.training.preload`) before they are given work. Neither the request nor the
making of Ray Data's actors is part of Ray's public interface: where they fail, the processes start when they are
needed, as they do without it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile

import ray

from pipeline.training.preload import TICKETS

KEEP_S = 120  # how long they may wait for the run
_ANSWER_S = 10.0
_logger = logging.getLogger(__name__)


class Beforehand:
    """Processes for a run with so many workers; made before Ray is started here, asked for afterwards.

    They inherit Ray's environment, as do all others. A ticket each, a file that one process alone can take, tells them
    from those that come later and need no torch.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._folder = tempfile.mkdtemp(prefix="tickets-")
        for number in range(workers + 1):
            open(os.path.join(self._folder, str(number)), "x").close()
        os.environ["RAY_preload_python_modules"] = "pipeline.training.preload"  # noqa: SIM112
        os.environ[TICKETS] = self._folder
        # Ray starts so many at a time as there are cores, and forgets those that were asked for beyond
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str((os.cpu_count() or 1) + workers + 1))

    def start(self) -> None:
        """Ask the Ray of this machine, which runs by now."""
        try:
            variables = {"env_vars": _variables()}
            _request(json.dumps(variables, sort_keys=True), 1)  # for the controller, as the driver writes it
            compact = json.dumps(variables, sort_keys=True, separators=(",", ":"))  # as the controller does
            _request(compact, self._workers)
            _share_actors()
        except Exception as error:
            self.close()
            _logger.debug("no processes are started beforehand: %s", error)

    def close(self) -> None:
        """Nobody needs a ticket any more."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _share_actors() -> None:
    """Ray Data's actors that every job shares, in two of the processes that Ray keeps ready.

    Made by the first who needs them, they would have processes of their own.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )
    from ray.data._internal.stats import get_or_create_stats_actor

    get_or_create_autoscaling_coordinator()
    get_or_create_stats_actor()


def _variables() -> dict[str, str]:
    """What Ray Train will set for the controller, and the controller for the workers."""
    from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR as NAME
    from ray.train.v2._internal.constants import DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE as VALUE
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    return {NAME: VALUE, **get_env_vars_to_propagate()}


def _request(runtime_env: str, count: int) -> None:
    import grpc
    from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc, runtime_environment_pb2

    node = next(node for node in ray.nodes() if node["Alive"])
    with grpc.insecure_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(
            node_manager_pb2.PrestartWorkersRequest(  # type: ignore[attr-defined]
                language=common_pb2.Language.PYTHON,  # type: ignore[attr-defined]
                job_id=ray.get_runtime_context().worker.current_job_id.binary(),
                runtime_env_info=runtime_environment_pb2.RuntimeEnvInfo(  # type: ignore[attr-defined]
                    serialized_runtime_env=runtime_env
                ),
                keep_alive_duration_secs=KEEP_S,
                num_workers=count,
            ),
            timeout=_ANSWER_S,
        )
