"""Trials on the cluster: Ray Tune runs what a searcher suggests, as many at once as there is room for."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from typing import Any

from ray import tune
from ray.exceptions import RayActorError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from pipeline.data.planners import TASK_CPUS
from pipeline.errors import PipelineError
from pipeline.search.searchers import CampaignSearcher
from pipeline.search.trial import Trial, last_line
from pipeline.training.cluster import capacity
from pipeline.training.config import Cluster

LAUNCHER_CPUS = 0.01  # what a process that launches a run under Ray Train reserves: it waits. Tune does not take 0
_SETTINGS = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's last word has no accuracy
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupted campaign is resumed from its ledger
    "RAY_AIR_NEW_OUTPUT": "0",  # its boxes name Tune's own files
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a traceback of its own for every process that died: Interruptions says it
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


class Interruptions(tune.Callback):
    """Tells in one line of a trial whose process died, or could not begin, and that goes on in another."""

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_pickled_error()
        what = last_line(error) if error and not isinstance(error, RayActorError) else "its process died"
        print(
            f"trial {trial.config['name']}: {what}; it goes on in another process, from its last checkpoint", flush=True
        )


def room(cluster: Cluster, resources: dict[str, float]) -> int:
    """How many trials the cluster takes at once, each with its workers and a share of a CPU for the rest."""
    cpus = cluster.workers * cluster.cpus_per_worker + LAUNCHER_CPUS + TASK_CPUS
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


def run_trials(
    searcher: CampaignSearcher,
    scheduler: TrialScheduler | None,
    at_once: int | None,
    trainable: type[Trial] = Trial,
) -> None:
    """Until the searcher has no more. A trial whose process dies is begun once more, from its last checkpoint.

    Tune's snapshots, which ``Tuner.restore`` begins with, are up to ten seconds old and have no state of the scheduler:
    the ledger, which is written at every validation, takes their place.
    """
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    cluster = searcher.campaign.train.cluster
    places = room(cluster, capacity())
    resources = {"CPU": LAUNCHER_CPUS}  # workers under Ray Train have their own
    if trainable.trains_here(cluster):
        resources = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    folder = tempfile.mkdtemp(prefix="campaign-")  # of Tune's own notes
    try:
        tune.Tuner(
            tune.with_resources(trainable, resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler or FIFOScheduler(),
                num_samples=-1,
                max_concurrent_trials=min(places, at_once or places),
                trial_name_creator=lambda trial: str(trial.config["name"]),
                trial_dirname_creator=lambda trial: str(trial.trial_id),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=searcher.campaign.name,
                storage_path=folder,
                verbose=0,
                callbacks=[Interruptions()],
                failure_config=tune.FailureConfig(max_failures=1),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trials write their own
            ),
        ).fit()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
