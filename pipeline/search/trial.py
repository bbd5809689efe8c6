"""One trial, as Ray Tune runs it: every step of the trainable trains to the next validation.

With one worker it trains in the trainable's own process, which Tune uses for one trial after the other: imports and the
dataset are there already. With several workers it launches a run under Ray Train. Either way the run's folder is the
same, and a trial that is begun again goes on from its last checkpoint.
"""

import contextlib
import functools
import json
import logging
import queue
import re
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from ray import tune

from pipeline import store
from pipeline.config import validate
from pipeline.data.dataset import Dataset
from pipeline.data.stream import Stream
from pipeline.errors import PipelineError, Unavailable
from pipeline.nets.own_code import send
from pipeline.training.checkpoint import free_name, name_of, save_checkpoint
from pipeline.training.config import Cluster, TrainConfig
from pipeline.training.diagnosis import WORKERS_LOST
from pipeline.training.launch import launch
from pipeline.training.learner import Learner, set_up
from pipeline.training.loop import Hooks, make_planner, training
from pipeline.training.runs import Run, accuracy_at, checkpoints, write_run
from pipeline.training.telemetry import CHECKPOINT_SECONDS, Telemetry, start_monitor
from pipeline.training.workers import Alone

ACCURACY, STEP, FAILED, AWAY, FINISHED, DONE = "val/accuracy", "step", "failed", "away", "finished", "done"
HINT = re.compile("; (?:then )?go on with it")  # with the run alone; the campaign says how to go on with itself
Validations = Generator[dict[str, Any], None, None]  # {STEP: .., ACCURACY: ..}


class Trial(tune.Trainable):
    """``config["run"]`` is a :class:`Run` as JSON; the trial pauses at step ``config["until"]``, unless that is 0.

    What goes wrong is reported as "failed", with its reason: it concerns this trial alone. A store or a cluster that
    does not answer, or has no room, is "away": it concerns all, and the trial can go on later.
    """

    _validations: Validations | None = None

    @classmethod
    def trains_here(cls, cluster: Cluster) -> bool:
        """Whether the trainable's own process is the worker."""
        return cluster.workers == 1

    def setup(self, config: dict[str, Any]) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self._run, self._until = Run(**json.loads(new_config["run"])), new_config["until"]
        send(new_config.get("code"))
        config = validate(TrainConfig, self._run.config)
        here = self.trains_here(config.cluster)
        self._validations = (in_this_process if here else under_ray_train)(config, self._run)
        return True

    def step(self) -> dict[str, Any]:
        assert self._validations is not None
        try:
            found = next(self._validations, {FINISHED: True, DONE: True})
        except PipelineError as error:
            away = isinstance(error, Unavailable) and WORKERS_LOST not in str(error)  # that may be the trial's doing
            reason = str(error).removeprefix(f"run {self._run.name}: ")
            return {AWAY if away else FAILED: HINT.split(reason)[0], DONE: True}
        except Exception as error:  # a bug, or a worker that died too often: the trial's log has the traceback
            logging.getLogger(__name__).exception("trial %s", self._run.name)
            return {FAILED: f"{type(error).__name__}: {last_line(error)}", DONE: True}
        if self._until and found.get(STEP, 0) >= self._until:
            found[DONE] = True
        return found

    def cleanup(self) -> None:
        if self._validations is not None:
            self._validations.close()


def in_this_process(config: TrainConfig, run: Run) -> Validations:
    """Train with one worker, here; the episodes are planned here too."""
    dataset, device = _dataset(config.dataset_uri), torch.device("cuda" if config.cluster.gpus_per_worker else "cpu")
    write_run(run)
    newest = [name_of(uri) for uri in checkpoints(run.uri)[-1:]]
    learner = set_up(config, run, dataset, newest[0] if newest else None, Alone(), device)
    telemetry = Telemetry(run.name, str(config.method["name"]), str(run.dataset["name"]), config.steps)
    validated: list[dict[str, Any]] = []

    def save(learner: Learner) -> None:
        folder, began = store.join(run.uri, free_name(run.uri, learner.step)), time.perf_counter()
        save_checkpoint(folder, learner.checkpoint(run.config, run.dataset))
        telemetry({CHECKPOINT_SECONDS: time.perf_counter() - began})
        for uri in superfluous(run.uri, config.checkpoint.keep):
            store.remove(uri)
        if learner.validated is not None:
            validated.append({STEP: learner.step, ACCURACY: learner.validated})

    planner = make_planner(config, dataset.manifest, learner.method)
    stream = Stream(
        dataset, planner, learner.step, config.steps, device=device, materialize=config.materialize, planned_here=True
    )
    hooks = Hooks(log=telemetry, save=save)
    body = training(learner, dataset, planner.per_step, hooks=hooks, waited=lambda: stream.waited)
    with telemetry, contextlib.closing(iter(stream)) as batches, contextlib.suppress(StopIteration):  # its end
        next(body)
        for batch in batches:
            body.send(batch)
            while validated:
                yield validated.pop()
    yield from validated


_dataset = functools.lru_cache(maxsize=1)(Dataset)


def under_ray_train(config: TrainConfig, run: Run) -> Validations:
    """Train with several workers; closed before its end, it asks them to save a checkpoint and leave."""
    entries: queue.Queue[Any] = queue.Queue()
    monitor = start_monitor()
    with ThreadPoolExecutor(1, run.name) as thread:
        launched = thread.submit(launch, config, run, on_log=entries.put, monitor=monitor)
        launched.add_done_callback(entries.put)
        try:
            while (entry := entries.get()) is not launched:
                if ACCURACY in entry:
                    yield {STEP: int(entry["step"]), ACCURACY: entry[ACCURACY]}
            launched.result()
        finally:
            monitor.leave.remote()


def superfluous(run_uri: str, keep: int) -> list[str]:
    """Checkpoints that are neither among the best ``keep`` nor the latest, as Ray Train deletes them."""
    accuracies = {uri: accuracy_at(uri) for uri in checkpoints(run_uri)[:-1]}
    scores = {uri: -1.0 if accuracy is None else accuracy for uri, accuracy in accuracies.items()}
    return sorted(scores, key=lambda uri: scores[uri], reverse=True)[keep:]


def last_line(error: BaseException) -> str:
    """Of a message with tracebacks, the line that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else "no message")[:300]
