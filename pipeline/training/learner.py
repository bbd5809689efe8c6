"""One optimizer step; the model, optimizer and position that a checkpoint holds; and how they are made or taken up."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import store
from pipeline.batch import Batch, Episodes, Images
from pipeline.data.augment import augment, step_generator
from pipeline.data.dataset import Dataset
from pipeline.data.philox import key_of, uniforms
from pipeline.data.seeds import seed_everything
from pipeline.errors import PipelineError
from pipeline.evaluation.embedded import Embeddings
from pipeline.model import build_model, build_preprocess
from pipeline.training.checkpoint import (
    BACKBONE,
    STATE,
    Checkpoint,
    begin_with,
    flatten_optimizers,
    load_checkpoint,
    newest_whole,
    restore_optimizers,
)
from pipeline.training.config import TrainConfig
from pipeline.training.models import load_teacher
from pipeline.training.optim import build_optimizer, build_schedule, set_rate
from pipeline.training.runs import START, Run
from pipeline.training.workers import Workers
from pipeline.weights import give

Figures = dict[str, Tensor]


def make_deterministic(threads: int | None, deterministic: bool) -> None:
    """Fix what the results of a CPU depend on beside the seed: the number of threads and the choice of kernels."""
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not deterministic


class Learner:
    """The training step of a run, without Ray.

    A step is a pure function of the weights, the optimizers' moments, the step number and the batch: random numbers
    (augmentation, dropout) are seeded by (seed, step, rank). It is one move of the optimizer "loss", before it one of
    the optimizer "auxiliary" where the method has an auxiliary loss and that has its turn.
    """

    def __init__(
        self, config: TrainConfig, spec: dict[str, Any], rank: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.config, self.spec, self.rank, self.device = config, spec, rank, torch.device(device)
        seed_everything("weights", config.seed)
        self.method = build_model(spec).to(self.device)
        if spec["method"].get("teacher") is not None:
            self.method.imitate(load_teacher(spec).to(self.device))
        self.preprocess = build_preprocess(spec).to(self.device)
        names = ("auxiliary", "loss") if self.method.regime == "both" else ("loss",)
        self.optimizers = {name: build_optimizer(self.method, config.optimizer) for name in names}
        self.schedule = build_schedule(config.schedule, config.steps)
        self.augmentation = config.augmentation.build()
        self.module: nn.Module = self.method  # what runs the forward pass; DDP and compile wrap it
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.embeddings: Embeddings | None = None  # of the validation images, by a backbone that stays as it is

    def begin(self, run: Run) -> None:
        """Take the weights from elsewhere that a run begins with, which one that goes on from a checkpoint has: those
        of its configuration, or of another run's checkpoint, which its folder may hold."""
        found = give(self.method.backbone, self.config.backbone)
        drawn = [name for name in self.method.state_dict() if not name.startswith(BACKBONE)]
        if self.config.initial is not None:
            drawn = begin_with(self.method, self.config.initial)
        if found is not None or self.config.initial is not None:
            self.method.begun_elsewhere(drawn)
        start = store.join(run.uri, START)
        if store.exists(store.join(start, STATE)):
            self.inherit(load_checkpoint(start))

    def train_step(self, batch: Batch) -> Figures:
        """One step on a batch of uint8 images; figures as tensors, so that nothing waits for the device."""
        self.method.train()
        seed_everything("step", self.config.seed, self.step, self.rank)
        figures: Figures = {}
        for name, prepared in self.turns(batch):
            found = self._descend(self.optimizers[name], prepared)
            figures |= found if name == "loss" else {f"{name}_{key}": value for key, value in found.items()}
        self.step += 1
        return figures

    def turns(self, batch: Batch) -> list[tuple[str, Batch]]:
        """The optimizers that move in this step, in their order, each with its batch, prepared."""
        turns: list[tuple[str, Batch]] = [("loss", self._prepare(batch))]
        if isinstance(batch, Episodes) and batch.auxiliary is not None:
            draw = uniforms(key_of("phases", self.config.seed), np.asarray([self.step]), 2)[0, 0]  # all workers' alike
            if draw < self.method.auxiliary_probability(self.step, self.config.steps):
                turns.insert(0, ("auxiliary", self._prepare(batch.auxiliary)))
        return turns

    def _prepare(self, batch: Batch) -> Batch:
        """Augmented and preprocessed: uint8 to float, on the device."""
        if isinstance(batch, Images):
            return Images(self.preprocess(self._augment(batch.images, "images")), batch.labels)
        return replace(
            batch,
            support=self.preprocess(self._augment(batch.support, "support")),
            query=self.preprocess(self._augment(batch.query, "query")),
            auxiliary=None,
        )

    def _augment(self, images: Tensor, part: str) -> Tensor:
        if not self.augmentation.active:
            return images
        generator = step_generator(self.device, "augment", self.config.seed, self.step, self.rank, part)
        flat = images.reshape(-1, *images.shape[-3:])
        return augment(flat, self.augmentation, generator).reshape(images.shape)

    def _descend(self, optimizer: torch.optim.Optimizer, batch: Batch) -> Figures:
        """Forward, backward, clipping and a step of the optimizer."""
        clip = self.config.clip
        with self.autocast():
            loss, metrics = self.module(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for p in self.method.clipped() if p.grad is not None]
        if clip.value is not None:
            nn.utils.clip_grad_value_(parameters, clip.value)
        if clip.norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip.norm)
        set_rate(optimizer, self.schedule(self.step))
        optimizer.step()
        self.method.after_step()
        return {"loss": loss.detach(), **metrics}

    def autocast(self) -> torch.autocast:
        """The run's precision of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.optimizers["loss"]

    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["base_lr"]) * self.schedule(self.step)

    def record(self, figures: dict[str, float]) -> dict[str, float]:
        """Add a line to the run's history."""
        entry = {"step": self.step, **figures}
        self.history.append(entry)
        self.metrics.update(figures)
        return entry

    @property
    def validated(self) -> float | None:
        """The accuracy of the validation after this step, if there was one."""
        last = self.history[-1] if self.history else {}
        return last.get("val/accuracy") if last.get("step") == self.step else None

    def checkpoint(self, config: dict[str, Any], dataset: dict[str, Any]) -> Checkpoint:
        tensors, groups = flatten_optimizers(self.optimizers)
        return Checkpoint(
            step=self.step,
            spec=self.spec,
            config=config,
            dataset=dataset,
            metrics=dict(self.metrics),
            history=list(self.history),
            model=dict(self.method.state_dict()),
            optimizer=tensors,
            groups=groups,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        self.method.load_state_dict(checkpoint.model)
        restore_optimizers(self.optimizers, checkpoint.optimizer, checkpoint.groups)
        self.step = checkpoint.step
        self.metrics = dict(checkpoint.metrics)
        self.history = list(checkpoint.history)

    @torch.no_grad()
    def inherit(self, checkpoint: Checkpoint) -> None:
        """Go on from another run's checkpoint with one's own configuration: its options and rates, and the weights
        that are not trained, which the configuration gives."""
        fixed = {name: p.clone() for name, p in self.method.named_parameters() if not p.requires_grad}
        options = [{key: value for key, value in group.items() if key != "params"} for group in self._groups()]
        self.restore(checkpoint)
        for name, parameter in self.method.named_parameters():
            if name in fixed:
                parameter.copy_(fixed[name])
        for group, own in zip(self._groups(), options, strict=True):
            group.update(own)

    def _groups(self) -> list[dict[str, Any]]:
        """Of all optimizers; restoring one makes them anew."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]


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
    learner = Learner(config, run.spec, workers.rank, device)
    if newest is not None:
        learner.restore(newest_whole(run.uri, newest, workers, say))
    else:
        learner.begin(run)
    if config.compile:
        learner.module = torch.compile(learner.module)  # type: ignore[assignment]
    return learner
