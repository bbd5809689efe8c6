"""A step of a run again, without Ray, to see which of its episodes gave a NaN or infinite loss.

The steps from the last checkpoint before it are taken again with the same episodes, shared as the run's workers shared
them: the gradient is the mean over the shares, as it is over workers. Then every episode of the step is looked at
alone, with the weights that the step began with.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Episodes, Images
from pipeline.config import Config, Section, validate
from pipeline.data.batches import read_batch
from pipeline.data.dataset import Dataset
from pipeline.data.episodes import AnyPlan, ImagePlan
from pipeline.data.seeds import seed_everything
from pipeline.errors import PipelineError
from pipeline.tables import text_table
from pipeline.training.checkpoint import Corrupt, load_checkpoint
from pipeline.training.config import Count, TrainConfig
from pipeline.training.learner import Learner, make_deterministic
from pipeline.training.loop import make_planner
from pipeline.training.runs import Run, checkpoints, find_run


class ReplayConfig(Section):
    """Keys of ``conf/replay.yaml``."""

    run: str
    step: Count
    storage: str


@dataclass(frozen=True)
class Looked:
    """One episode (or share of images) alone."""

    number: int  # of the episode; of the first image
    loss: float
    gradient: float  # 2-norm over all parameters
    classes: list[str]
    rows: list[int]  # of the dataset

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient)


class Shares(nn.Module):
    """The mean over the workers' shares, as ``DistributedDataParallel`` gives it; each share draws as its worker."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self._learner = [learner]  # in a list, since the learner is no part of this module but holds it

    def forward(self, shares: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        learner, losses = self._learner[0], []
        buffers = {name: value.clone() for name, value in learner.method.named_buffers()}
        kept = buffers
        for rank, share in enumerate(shares):
            seed_everything("step", learner.config.seed, learner.step, rank)
            for name, value in learner.method.named_buffers():
                value.data.copy_(buffers[name])
            losses.append(learner.method(share)[0])
            if rank == 0:  # whose running averages all workers have
                kept = {name: value.clone() for name, value in learner.method.named_buffers()}
        for name, value in learner.method.named_buffers():
            value.data.copy_(kept[name])
        return torch.stack(losses).mean(), {}


class Replayed(Learner):
    """A learner whose batch is the list of all workers' shares."""

    def turns(self, shares: Any) -> Any:
        of_workers = [self.turns_of(share, rank) for rank, share in enumerate(shares)]
        return [(turns[0][0], [share for _, share in turns]) for turns in zip(*of_workers, strict=True)]

    def parts(self, share: Batch, rank: int) -> list[Batch]:
        """A worker's episodes one by one, prepared together as in the step, which draws augmentation for all."""
        self.rank = rank
        whole = self._prepare(share)
        if isinstance(whole, Images):
            return [whole]
        parts: list[Batch] = []
        for n in (slice(number, number + 1) for number in range(whole.tasks)):
            support, query = (whole.support[n], whole.support_labels[n]), (whole.query[n], whole.query_labels[n])
            parts.append(Episodes(*support, *query, whole.classes[n], whole.way))
        if isinstance(share, Episodes) and share.auxiliary is not None:
            parts.append(self._prepare(share.auxiliary))
        return parts

    def turns_of(self, share: Batch, rank: int) -> list[tuple[str, Batch]]:
        self.rank = rank  # augmentation is the worker's own
        return super().turns(share)


def replay_job(raw: Config) -> dict[str, Any]:
    """Print what every episode of a step gives."""
    config = validate(ReplayConfig, raw)
    run = find_run(config.run, config.storage)
    looked, began = replay(run, config.step)
    rows = []
    for one in looked:
        figures = [one.number, f"{one.loss:.4g}", f"{one.gradient:.4g}"]
        rows.append([*figures, ", ".join(one.classes), "" if one.finite else "NaN or infinite"])
    begins = f"with the weights after step {config.step - 1} (from checkpoint {began})"
    print(f"run {run.name}, step {config.step}, {begins}")
    print(text_table(["episode", "loss", "gradient norm", "classes", ""], rows))
    wrong = [one.number for one in looked if not one.finite]
    for one in looked:
        if not one.finite:
            print(f"episode {one.number} is made of rows {', '.join(map(str, one.rows))} of {run.dataset['uri']}")
    if not wrong:
        print("every episode alone has a finite loss and gradient")
    episodes = [vars(one) for one in looked]
    return {"run": run.name, "step": config.step, "from": began, "not_finite": wrong, "episodes": episodes}


def replay(run: Run, step: int) -> tuple[list[Looked], int]:
    """What each episode of step ``step`` (1 is the first) gives, and the step of the checkpoint that it began with.

    Raises:
        PipelineError: the run has no such step, or its dataset is another now.
    """
    config = validate(TrainConfig, run.config)
    if step > config.steps:
        raise PipelineError(f"step={step}: run {run.name} has {config.steps} steps")
    dataset = Dataset(config.dataset_uri)
    if dataset.manifest.fingerprint != run.dataset["fingerprint"]:
        raise PipelineError(f"run={run.name}: the dataset at {config.dataset_uri} has changed since the run began")
    make_deterministic(config.cluster.threads_per_worker, config.deterministic)
    learner = Replayed(config, run.spec)
    learner.module = Shares(learner)
    _restore_before(learner, run, step)
    began, workers = learner.step, config.cluster.workers
    planner = make_planner(config, dataset.manifest, learner.method)
    while learner.step < step - 1:
        shares = [read_batch(dataset, planner.plan(learner.step, rank, workers)) for rank in range(workers)]
        learner.train_step(shares)  # type: ignore[arg-type]
    looked = []
    for rank in range(workers):
        plan = planner.plan(step - 1, rank, workers)
        parts = learner.parts(read_batch(dataset, plan), rank)
        for part, batch in zip(_episodes(plan), parts, strict=True):
            looked.append(_look(learner, dataset, part, batch, rank))
    return looked, began


def _restore_before(learner: Learner, run: Run, step: int) -> None:
    for uri in reversed(checkpoints(run.uri)):
        try:
            checkpoint = load_checkpoint(uri)
        except Corrupt as error:
            print(f"{error}; an older one is taken", flush=True)
            continue
        if checkpoint.step < step:
            learner.restore(checkpoint)
            return
    learner.begin(run)


def _episodes(plan: AnyPlan) -> list[AnyPlan]:
    """One by one; a share of images stays whole."""
    if isinstance(plan, ImagePlan):
        return [plan]
    episodes: list[AnyPlan] = [plan[number : number + 1] for number in range(len(plan))]
    return episodes if plan.auxiliary is None else [*episodes, plan.auxiliary]


def _look(learner: Replayed, dataset: Dataset, plan: AnyPlan, batch: Batch, rank: int) -> Looked:
    """Loss and gradient of a part of a step; the learner stays as it is."""
    method = copy.deepcopy(learner.method).train()
    seed_everything("step", learner.config.seed, learner.step, rank)
    with learner.autocast():
        loss, _ = method(batch)
    loss.backward()
    gradients = [p.grad.norm() for p in method.parameters() if p.grad is not None]
    names, rotations = dataset.manifest.class_names, len(dataset.manifest.rotations)
    classes = [names[int(number) // rotations] for number in np.unique(plan.classes)]
    norm = float(torch.stack(gradients).norm()) if gradients else 0.0
    return Looked(int(plan.numbers.reshape(-1)[0]), float(loss.detach()), norm, classes, plan.rows.reshape(-1).tolist())
