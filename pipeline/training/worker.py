"""What runs in every Ray Train worker: the loop, with DDP around the method and the stream behind it."""

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
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
from pipeline.training.runs import Run
from pipeline.training.telemetry import CHECKPOINT_SECONDS
from pipeline.training.workers import Alone, Distributed, Workers

PROGRESS_SECONDS = 0.5


def train_worker(job: dict[str, Any]) -> None:
    """``job`` holds the run and the monitor."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    run, monitor = job["run"], job["monitor"]
    config = validate(TrainConfig, run.config)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    monitor.begin.remote()
    dataset = Dataset(config.dataset_uri)
    send(job["code"])
    workers: Workers = Distributed(device) if world_size > 1 else Alone()
    newest = ray.train.get_checkpoint()
    learner = set_up(config, run, dataset, newest and name_of(newest.path), workers, device, monitor.say.remote)
    if world_size > 1 and any(parameter.requires_grad for parameter in learner.method.parameters()):
        learner.module = DistributedDataParallel(
            learner.module,
            device_ids=[device] if device.type == "cuda" else None,
            find_unused_parameters=learner.method.regime == "both",  # each of its losses trains a part of the method
        )

    planner = make_planner(config, dataset.manifest, learner.method)
    stream = Stream(
        dataset, planner, learner.step, config.steps, rank, world_size, device, materialize=config.materialize
    )
    preemption = Preemption(world_size)
    hooks = Hooks(save=lambda learner: _report(learner, run, monitor, rank), preemption=preemption)
    if rank == 0:
        hooks.log, hooks.say, hooks.step = monitor.log.remote, monitor.say.remote, _ticker(monitor, preemption)
    try:
        train(learner, stream, dataset, planner.per_step, workers, hooks, waited=lambda: stream.waited)
        if rank == 0 and preemption.left and learner.step < config.steps:
            ray.get(monitor.stop.remote(f"stopped after step {learner.step:,} as asked, with a checkpoint"))
    except Diverged as error:  # a new try from the last checkpoint would end here again
        if rank == 0:
            ray.get(monitor.stop.remote(str(error)))


def _ticker(monitor: Any, preemption: Preemption) -> Callable[[int], None]:
    """Tells the monitor of the step now and then; what it answers is looked at a step later, so that nobody waits."""
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
            answers.append(monitor.tick.remote(step))

    return tick


def _report(learner: Learner, run: Run, monitor: Any, rank: int) -> None:
    """Hand a checkpoint to Ray Train, on all workers at once; the first one's weights are everybody's."""
    accuracy = -1.0 if learner.validated is None else learner.validated  # ranks below every validated one
    metrics = {"step": learner.step, "val/accuracy": accuracy}
    if rank:
        ray.train.report(metrics)
        return
    folder, began = tempfile.mkdtemp(prefix="checkpoint-"), time.perf_counter()
    try:
        save_checkpoint(folder, learner.checkpoint(run.config, run.dataset))
        made, name = ray.train.Checkpoint.from_directory(folder), free_name(run.uri, learner.step)
        ray.train.report(metrics, checkpoint=made, checkpoint_dir_name=name)
        monitor.log.remote({"step": learner.step, CHECKPOINT_SECONDS: time.perf_counter() - began})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
