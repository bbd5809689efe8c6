"""What runs in every Ray Train worker: the loop, with DDP around the method and the stream behind it."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
from typing import Any

import ray
import ray.train
import ray.train.torch
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import validate
from pipeline.data.dataset import Dataset
from pipeline.data.stream import Stream
from pipeline.errors import Diverged
from pipeline.nets.own_code import send
from pipeline.training.checkpoint import free_name, name_of, save_checkpoint
from pipeline.training.config import TrainConfig
from pipeline.training.learner import Learner, set_up
from pipeline.training.loop import Hooks, make_planner, train
from pipeline.training.preemption import Preemption, Signal
from pipeline.training.telemetry import CHECKPOINT_SECONDS
from pipeline.training.workers import Alone, Distributed, Workers

PROGRESS_SECONDS = 0.5


def train_worker(job: dict[str, Any]) -> None:
    """``job`` holds the run and the monitor."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    config = validate(TrainConfig, job["run"].config)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    job["monitor"].begin.remote()
    dataset, run = Dataset(config.dataset_uri), job["run"]
    send(job["code"])
    workers: Workers = Distributed(device) if world_size > 1 else Alone()
    newest = ray.train.get_checkpoint()
    learner = set_up(config, run, dataset, newest and name_of(newest.path), workers, device, _speaker(job))
    if world_size > 1 and any(parameter.requires_grad for parameter in learner.method.parameters()):
        learner.module = DistributedDataParallel(
            learner.module,
            device_ids=[device] if device.type == "cuda" else None,
            find_unused_parameters=learner.method.regime == "both",  # each of its losses trains a part of the method
        )

    planner = make_planner(config, dataset, learner.method)
    stream = Stream(
        dataset, planner, learner.step, config.steps, rank, world_size, device, materialize=config.materialize
    )
    preemption = Preemption(world_size)
    hooks = Hooks(
        log=_logger(job, rank),
        say=_speaker(job) if rank == 0 else lambda line: None,
        save=lambda learner: _report(learner, job, rank),
        step=_ticker(job, rank, preemption),
        preemption=preemption,
    )
    try:
        train(learner, stream, dataset, planner.per_step, workers, hooks, waited=lambda: stream.waited)
        if rank == 0 and preemption.left and learner.step < config.steps:
            ray.get(job["monitor"].stop.remote(f"stopped after step {learner.step:,} as asked, with a checkpoint"))
    except Diverged as error:  # a new try from the last checkpoint would end here again
        if rank == 0:
            ray.get(job["monitor"].stop.remote(str(error)))


def _logger(job: dict[str, Any], rank: int) -> Any:
    if rank:
        return lambda entry: None
    return lambda entry: job["monitor"].log.remote(entry)


def _speaker(job: dict[str, Any]) -> Any:
    return lambda line: job["monitor"].say.remote(line)


def _ticker(job: dict[str, Any], rank: int, preemption: Preemption) -> Any:
    """Tells the monitor of the step now and then; what it answers is looked at a step later, so that nobody waits."""
    if rank:
        return lambda step: None
    last = [0.0]
    answers: list[Any] = []

    def tick(step: int) -> None:
        if answers and ray.wait(answers, timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayError):
                if ray.get(answers.pop()):
                    preemption.hear(Signal.LEAVE)
        now = time.monotonic()
        if not answers and now - last[0] >= PROGRESS_SECONDS:
            last[0] = now
            answers.append(job["monitor"].tick.remote(step))

    return tick


def _report(learner: Learner, job: dict[str, Any], rank: int) -> None:
    """Hand a checkpoint to Ray Train, on all workers at once; the first one's weights are everybody's."""
    validated = (
        learner.history and learner.history[-1]["step"] == learner.step and "val/accuracy" in learner.history[-1]
    )
    metrics = {
        "step": learner.step,
        "val/accuracy": learner.metrics["val/accuracy"] if validated else -1.0,  # ranks below every validated one
    }
    if rank:
        ray.train.report(metrics)
        return
    name = free_name(job["run"].uri, learner.step)
    folder, began = tempfile.mkdtemp(prefix="checkpoint-"), time.perf_counter()
    try:
        save_checkpoint(folder, learner.checkpoint(job["run"].config, job["run"].dataset))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder), checkpoint_dir_name=name)
        job["monitor"].log.remote({"step": learner.step, CHECKPOINT_SECONDS: time.perf_counter() - began})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
