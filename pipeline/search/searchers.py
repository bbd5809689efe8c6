"""Which trial comes next, and Ray Tune, which runs as many at once as there is room for.

What Tune asks, and tells of the trials, goes through the ledger.
"""

import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayActorError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipeline import store
from pipeline.data.planners import TASK_CPUS
from pipeline.errors import PipelineError, Unavailable
from pipeline.search.asha import ASHA
from pipeline.search.campaign import Campaign
from pipeline.search.ledger import Ledger, Record
from pipeline.search.space import Values, propose
from pipeline.search.trial import ACCURACY, AWAY, FAILED, FINISHED, STEP, Trial, last_line
from pipeline.training.checkpoint import STATE
from pipeline.training.cluster import capacity
from pipeline.training.config import Cluster
from pipeline.training.runs import Run, checkpoints
from pipeline.weights import own_sources

LAUNCHER_CPUS = 0.01  # what a process that launches a run under Ray Train reserves: it waits. Tune does not take 0
_SETTINGS = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's last word has no accuracy
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupted campaign is resumed from its ledger
    "RAY_AIR_NEW_OUTPUT": "0",  # its boxes name Tune's own files
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a traceback of its own for every process that died: Interruptions says it
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
CRASHED = "its process died more often than it may (Ray's logs of this time tell more)"


class CampaignSearcher(Searcher):
    """Trials in their order: first those that were interrupted, then new ones. The ledger is its state.

    Args:
        ended: told of every trial that came to its end.
    """

    def __init__(
        self, campaign: Campaign, ledger: Ledger, ended: Callable[[Record], None] = lambda record: None
    ) -> None:
        super().__init__(metric=ACCURACY, mode="max")
        self.campaign, self.ledger, self.ended = campaign, ledger, ended
        self._interrupted = self.running()
        self.away: str | None = None  # what did not answer, or had no room: no more trials until it does
        self._out: set[str] = set()  # runs that were handed out and are not back
        self._records: dict[str, Record] = {}  # by Tune's name of the trial

    def known(self) -> list[Record]:
        """The trials that there have been, of those that this searcher suggests."""
        raise NotImplementedError

    def new(self) -> Record | None:
        """A trial that there has not been."""
        raise NotImplementedError

    def running(self) -> list[Record]:
        return [record for record in self.known() if record.status == "running"]

    def replay(self, scheduler: ASHA) -> None:
        """Bring the scheduler to where it was; interrupted trials tell what they did unseen, and may end by it.

        What the ledger has was judged when it came, which need not have been in the order of the trials, and stops
        nobody now. What is unseen came after all that.
        """
        for record in self.known():
            scheduler.replay(record)
        for record in self.running():
            found = self.refreshed(record)
            self.ledger.put(found)
            judged = dict(record.curve)
            unseen = tuple(point for point in found.curve if point[0] not in judged)
            if not scheduler.replay(replace(found, curve=unseen)):
                self.stopped(found, found.step)
        self._interrupted = self.running()

    def open(self) -> bool:
        """Whether there is a trial left."""
        return bool(self._interrupted) or self.new() is not None

    def following(self) -> Record | None:
        return self._interrupted.pop(0) if self._interrupted else self.new()

    def next(self) -> tuple[Record, Run] | None:
        """The next trial that can be; one that asks for the impossible has failed before it began."""
        while (record := self.following()) is not None:
            try:
                run = self.campaign.prepare(record.values, record.run, record.seed)
            except Unavailable as error:
                self.away = f"trial {record.run}: {error}"
                return None
            except PipelineError as error:
                self.end(replace(record, status="failed", reason=str(error)))
                continue
            self.ledger.put(record)
            self._out.add(record.run)
            return record, run
        return None

    def waits(self) -> bool:
        """Whether there may be more once those that run are back."""
        return False

    def until(self) -> int:
        """The step at which a trial pauses, to be gone on with later; 0: none."""
        return 0

    def stopped(self, record: Record, step: int) -> None:
        """It was stopped at this validation."""
        self.end(replace(record, status="stopped", reason=f"not among the best at step {step:,}"))

    def end(self, record: Record) -> None:
        self._out.discard(record.run)
        record = replace(record, ended=time.time())
        self.ledger.put(record)
        self.ended(record)

    # What Ray Tune calls:

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        if self.away is not None:
            return Searcher.FINISHED
        found = self.next()
        if found is None:
            return None if self.waits() else Searcher.FINISHED
        record, run = found
        self._records[trial_id] = record
        return {
            "number": record.number,
            "name": record.run,
            "run": json.dumps(asdict(run)),
            "until": self.until(),
            "code": own_sources(run.spec),
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if ACCURACY in result:
            record = self._records[trial_id].with_point(int(result[STEP]), float(result[ACCURACY]))
            self._records[trial_id] = record
            self.ledger.put(record)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        record, said = self._records.pop(trial_id), result or {}
        if AWAY in said:  # in the ledger it runs: it was interrupted
            self._out.discard(record.run)
            self.away = f"trial {record.run}: {said[AWAY]}"
        elif FAILED in said:
            self.end(replace(record, status="failed", reason=str(said[FAILED])))
        elif FINISHED in said:
            self.end(replace(self.refreshed(record), status="finished"))
        elif error or ACCURACY not in said:
            self.end(replace(record, status="failed", reason=CRASHED))
        else:  # what it computed after this validation does not count
            step = int(said[STEP])
            record = self.refreshed(record).with_point(step, float(said[ACCURACY]))
            self.stopped(replace(record, curve=tuple(point for point in record.curve if point[0] <= step)), step)

    def refreshed(self, record: Record) -> Record:
        """With the validations that its latest checkpoint knows of, told or not."""
        for uri in checkpoints(store.join(self.campaign.uri, record.run))[-1:]:
            for entry in json.loads(store.read_bytes(store.join(uri, STATE)))["history"]:
                if ACCURACY in entry:
                    record = record.with_point(int(entry["step"]), float(entry[ACCURACY]))
        return record

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for Tune's snapshots, which nothing is restored from

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        pass


class SearchTrials(CampaignSearcher):
    """First the given points, then what the search proposes from what is known."""

    def known(self) -> list[Record]:
        return self.ledger.search

    def new(self) -> Record | None:
        campaign, config, number = self.campaign, self.campaign.config, len(self.known())
        if number >= config.trials:
            return None
        if number < len(campaign.first):
            values: Values | None = campaign.first[number]
        else:
            known = [record.known(campaign.train.validation.select) for record in self.known()]
            search, startup = config.search, len(campaign.first) + config.search.startup
            values = propose(campaign.space, search.kind, search.seed, number, known, startup)
        if values is None:
            return None
        return Record(number, f"{campaign.name}-{number:04d}", values, began=time.time())


class FinalistTrials(CampaignSearcher):
    """Configurations, each with every seed: all of one seed, then all of the next."""

    def __init__(
        self,
        campaign: Campaign,
        ledger: Ledger,
        chosen: Sequence[Record],
        seeds: Sequence[int],
        ended: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self._pairs = [(record, seed) for seed in seeds for record in chosen]
        super().__init__(campaign, ledger, ended)

    def known(self) -> list[Record]:
        return self.ledger.repetitions

    def new(self) -> Record | None:
        for record, seed in self._pairs:
            run = f"{record.run}-seed{seed}"
            if self.ledger.get(run) is None:
                return Record(record.number, run, record.values, seed=seed, began=time.time())
        return None


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

    Raises:
        Unavailable: the store or the cluster did not answer a trial, or had no room for it; no more were begun.
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
    if searcher.away is not None:
        raise Unavailable(searcher.away)
