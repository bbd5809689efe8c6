"""Trials on the cluster: Ray Tune runs what a plan hands out, as many at once as there is room for."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from pipeline.data.planners import TASK_CPUS
from pipeline.errors import PipelineError
from pipeline.search.feed import Feed
from pipeline.search.plans import Plan
from pipeline.search.trial import run_trial
from pipeline.training.cluster import capacity
from pipeline.training.config import Cluster

DRIVER_CPUS = 0.01  # what the process that launches a trial reserves: it waits. Tune does not take 0
_SETTINGS = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's last word has no accuracy
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupted campaign is resumed from its ledger
    "RAY_AIR_NEW_OUTPUT": "0",  # its boxes name Tune's own files
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def room(cluster: Cluster, resources: dict[str, float]) -> int:
    """How many trials the cluster takes at once, each with its workers and the tasks that plan its episodes."""
    cpus = cluster.workers * cluster.cpus_per_worker + DRIVER_CPUS + TASK_CPUS
    places = math.floor(resources.get("CPU", 0.0) / cpus + 1e-9)
    if cluster.gpus_per_worker:
        gpus = cluster.workers * cluster.gpus_per_worker
        places = min(places, math.floor(resources.get("GPU", 0.0) / gpus + 1e-9))
    if not places:
        raise PipelineError(
            f"a trial needs {cpus:g} CPUs and {cluster.workers * cluster.gpus_per_worker:g} GPUs; the cluster has "
            f"{resources.get('CPU', 0):g} and {resources.get('GPU', 0):g}: lower cpus_per_trial or gpus_per_trial"
        )
    return places


def run_trials(plan: Plan, scheduler: TrialScheduler | None, at_once: int | None) -> None:
    """Until the plan has no more. A trial whose process dies is begun once more, and goes on from its checkpoint."""
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    places = room(plan.campaign.train.cluster, capacity())
    folder = tempfile.mkdtemp(prefix="campaign-")  # of Tune's own notes: the ledger holds what matters
    try:
        tune.Tuner(
            tune.with_resources(run_trial, {"CPU": DRIVER_CPUS}),
            tune_config=tune.TuneConfig(
                search_alg=Feed(plan),
                scheduler=scheduler or FIFOScheduler(),
                num_samples=-1,
                max_concurrent_trials=min(places, at_once or places),
                trial_name_creator=_name,
                trial_dirname_creator=_name,
                reuse_actors=False,
            ),
            run_config=tune.RunConfig(
                name=plan.campaign.name,
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=1),
            ),
        ).fit()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _name(trial: object) -> str:
    config = trial.config  # type: ignore[attr-defined]
    return f"{config['name']}-to-{config['until']}" if config["until"] else str(config["name"])
