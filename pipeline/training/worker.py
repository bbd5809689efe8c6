"""What runs in every Ray Train worker: the loop, with DDP around the method and the stream behind it."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import validate
from pipeline.data.dataset import Dataset
from pipeline.data.stream import Stream
from pipeline.errors import Diverged, PipelineError
from pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from pipeline.training.config import TrainConfig
from pipeline.training.learner import Learner, make_deterministic
from pipeline.training.loop import Alone, Hooks, Workers, make_planner, train

PROGRESS_SECONDS = 0.5


class Distributed:
    """The workers of a process group."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world_size, self._device = dist.get_rank(), dist.get_world_size(), device

    def mean(self, values: Tensor) -> Tensor:
        total = values.detach().to(self._device)
        dist.all_reduce(total)
        return total / self.world_size

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Values that were dealt out in turn, put together in their order on every worker."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, values)
        whole = np.empty(sum(len(part) for part in parts), dtype=np.float64)
        for rank, part in enumerate(parts):
            whole[rank :: self.world_size] = part
        return whole


def train_worker(job: dict[str, Any]) -> None:
    """``job`` holds the composed configuration, the model's spec, the dataset's fingerprint and the monitor."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    config = validate(TrainConfig, job["config"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    make_deterministic(config.cluster.threads_per_worker, config.deterministic)
    dataset = Dataset(config.dataset_uri)
    if dataset.manifest.fingerprint != job["dataset"]["fingerprint"]:
        raise PipelineError(f"{config.dataset_uri} on this node is not the dataset that the run began with")

    learner = Learner(config, job["spec"], rank, device)
    start = ray.train.get_checkpoint()
    if start is not None:
        with start.as_directory() as folder:
            learner.restore(load_checkpoint(folder))
    workers: Workers = Alone()
    if config.compile:
        learner.module = torch.compile(learner.module)  # type: ignore[assignment]
    if world_size > 1:
        workers = Distributed(device)
        learner.module = DistributedDataParallel(
            learner.module,
            device_ids=[device] if device.type == "cuda" else None,
            find_unused_parameters=len(learner.method.phases) > 1,  # a phase may train a part of the method
        )

    planner = make_planner(config, dataset, learner.method)
    stream = Stream(
        dataset, planner, learner.step, config.steps, rank, world_size, device, materialize=config.materialize
    )
    hooks = Hooks(log=_logger(job, rank), save=lambda learner: _report(learner, job, rank), step=_ticker(job, rank))
    try:
        train(learner, stream, dataset, planner.per_step, workers, hooks, waited=lambda: stream.waited)
    except Diverged as error:  # a new try from the last checkpoint would end here again
        if rank == 0:
            ray.get(job["monitor"].stop.remote(str(error)))


def _logger(job: dict[str, Any], rank: int) -> Any:
    if rank:
        return lambda entry: None
    return lambda entry: job["monitor"].log.remote(entry)


def _ticker(job: dict[str, Any], rank: int) -> Any:
    if rank:
        return lambda step: None
    last = [0.0]

    def tick(step: int) -> None:
        now = time.monotonic()
        if now - last[0] >= PROGRESS_SECONDS:
            last[0] = now
            job["monitor"].tick.remote(step)

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
    name = f"step_{learner.step:08d}"
    if rank:
        ray.train.report(metrics, checkpoint_dir_name=name)
        return
    folder = tempfile.mkdtemp(prefix="checkpoint-")
    try:
        save_checkpoint(folder, learner.checkpoint(job["config"], job["dataset"]))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder), checkpoint_dir_name=name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
