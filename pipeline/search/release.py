"""What a trial holds on the cluster, and how it is given back when Ray Tune stops the trial in mid-run.

Ray Tune kills the process that launched the run, and the run's controller with it. The controller's placement group
would stay, its cores and GPUs taken: Ray Train's own cleaner learns of the controller's death from the dashboard alone,
and a Ray that was started here has none. So the controller is asked to end, before its launcher is killed.
"""

from __future__ import annotations

import base64
import logging
from typing import Any

import ray
from ray import cloudpickle
from ray.util.placement_group import remove_placement_group
from ray.util.queue import Queue

from pipeline.ray_internals import worker_group_callback

HELD = "held"
TIMEOUT_S = 20.0


class Holder(worker_group_callback()):  # type: ignore[misc]
    """In a run's controller: tells Ray Tune, as "held", who controls the run and which placement group it has."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue  # of what is passed on to Ray Tune

    def after_worker_group_start(self, worker_group: Any) -> None:
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        controller = ray.get_runtime_context().current_actor
        self._queue.put({HELD: base64.b64encode(cloudpickle.dumps((controller, group))).decode()})


def release(held: str) -> None:
    """End the run that told this, and give back what it has."""
    controller, group = cloudpickle.loads(base64.b64decode(held))
    try:
        ray.get(controller.abort.remote(), timeout=TIMEOUT_S)
    except ray.exceptions.RayActorError:
        pass  # it ended, as it should
    except Exception:
        logging.getLogger(__name__).warning("a stopped trial's controller does not answer and is killed")
        ray.kill(controller)
    remove_placement_group(group)
