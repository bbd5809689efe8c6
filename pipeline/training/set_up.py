"""What a process needs before the first step of a run that it begins or goes on with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline import store
from pipeline.data.dataset import Dataset
from pipeline.errors import PipelineError
from pipeline.training.checkpoint import STATE, load_checkpoint, newest_whole
from pipeline.training.config import TrainConfig
from pipeline.training.learner import Learner, make_deterministic
from pipeline.training.runs import START, Run
from pipeline.training.workers import Workers


def set_up(
    config: TrainConfig,
    run: Run,
    dataset: Dataset,
    newest: str | None,
    workers: Workers,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> Learner:
    """The learner of a run, where the run left off.

    Args:
        newest: name of the newest checkpoint, to go on from; None: there is none, and the run begins, with the
            checkpoint of another one that its folder may hold.
        say: is told of corrupt checkpoints.
    """
    make_deterministic(config.cluster.threads_per_worker, config.deterministic)
    if dataset.manifest.fingerprint != run.dataset["fingerprint"]:
        raise PipelineError(f"{config.dataset_uri} on this node is not the dataset that the run began with")
    learner, start = Learner(config, run.spec, workers.rank, device), store.join(run.uri, START)
    if newest is not None:
        learner.restore(newest_whole(run.uri, newest, workers, say))
    else:
        learner.begin()
        if store.exists(store.join(start, STATE)):
            learner.inherit(load_checkpoint(start))
    if config.compile:
        learner.module = torch.compile(learner.module)  # type: ignore[assignment]
    return learner
