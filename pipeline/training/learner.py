"""One optimizer step, and the model, optimizer and position that a checkpoint holds."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.batch import Batch, CoTraining, Episodes, Images
from pipeline.data.augment import augment, step_generator
from pipeline.data.philox import key_of, uniforms
from pipeline.model import build_model, build_preprocess
from pipeline.training.checkpoint import Checkpoint, flatten_optimizers, restore_optimizers
from pipeline.training.config import TrainConfig
from pipeline.training.initial import begin_with
from pipeline.training.optim import build_optimizer, build_schedule, set_rate

Figures = dict[str, Tensor]


def make_deterministic(threads: int | None, deterministic: bool) -> None:
    """Fix what the results of a CPU depend on beside the seed: the number of threads and the choice of kernels."""
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not deterministic


def seed_everything(*parts: object) -> None:
    low, high = key_of(*parts)
    torch.manual_seed(high << 32 | low)
    np.random.seed(low)
    random.seed(high << 32 | low)


class Learner:
    """The training step of a run, without Ray.

    A step is a pure function of the weights, the optimizer's moments, the step number and the batch: random numbers
    (augmentation, dropout) are seeded by (seed, step, rank).
    """

    def __init__(
        self, config: TrainConfig, spec: dict[str, Any], rank: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.config, self.spec, self.rank, self.device = config, spec, rank, torch.device(device)
        seed_everything("weights", config.seed)
        self.method = build_model(spec).to(self.device)
        if config.initial is not None:
            begin_with(self.method, config.initial)
        self.preprocess = build_preprocess(spec).to(self.device)
        self.optimizers = {phase: build_optimizer(self.method, config.optimizer) for phase in self.method.phases}
        self.schedule = build_schedule(config.schedule, config.steps)
        self.augmentation = config.augmentation.build()
        self.module: nn.Module = self.method  # what runs the forward pass; DDP and compile wrap it
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.history: list[dict[str, float]] = []

    def train_step(self, batch: Batch) -> Figures:
        """One step on a batch of uint8 images; figures as tensors, so that nothing waits for the device."""
        config = self.config
        self.method.train()
        seed_everything("step", config.seed, self.step, self.rank)
        batch = self._prepare(batch)
        if len(self.optimizers) == 1:
            return self._count(self._update("loss", batch))
        assert isinstance(batch, CoTraining)
        draws = uniforms(key_of("phases", config.seed), np.asarray([self.step]), len(self.optimizers))[0]
        figures: Figures = {}
        for phase, draw in zip(self.optimizers, draws, strict=True):
            if self.method.runs(phase, self.step, config.steps, float(draw)):
                found = self._update(phase, batch.episodes if phase == "loss" else batch.images)
                figures |= found if phase == "loss" else {f"{phase}_{key}": value for key, value in found.items()}
        return self._count(figures)

    def _update(self, phase: str, batch: Batch) -> Figures:
        """Forward, backward and a step of the phase's optimizer."""
        config, optimizer = self.config, self.optimizers[phase]
        set_rate(optimizer, self.schedule(self.step))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            loss, metrics = self.module(batch, phase)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for p in self.method.parameters() if p.grad is not None]
        if config.clip.value is not None:
            nn.utils.clip_grad_value_(parameters, config.clip.value)
        if config.clip.norm is not None:
            nn.utils.clip_grad_norm_(parameters, config.clip.norm)
        optimizer.step()
        self.method.after_step()
        return {"loss": loss.detach(), **metrics}

    def _count(self, figures: Figures) -> Figures:
        self.step += 1
        return figures

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.optimizers["loss"]

    def _prepare(self, batch: Batch) -> Batch:
        """Augmented and preprocessed: uint8 to float, on the device."""
        if isinstance(batch, CoTraining):
            episodes, images = self._prepare(batch.episodes), self._prepare(batch.images)
            assert isinstance(episodes, Episodes) and isinstance(images, Images)
            return CoTraining(episodes, images)
        if isinstance(batch, Images):
            return Images(self.preprocess(self._augment(batch.images, "images")), batch.labels)
        assert isinstance(batch, Episodes)
        return replace(
            batch,
            support=self.preprocess(self._augment(batch.support, "support")),
            query=self.preprocess(self._augment(batch.query, "query")),
        )

    def _augment(self, images: Tensor, part: str) -> Tensor:
        if not self.augmentation.active:
            return images
        generator = step_generator(self.device, "augment", self.config.seed, self.step, self.rank, part)
        flat = images.reshape(-1, *images.shape[-3:])
        return augment(flat, self.augmentation, generator).reshape(images.shape)

    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["base_lr"]) * self.schedule(self.step)

    def record(self, figures: dict[str, float]) -> dict[str, float]:
        """Add a line to the run's history."""
        entry = {"step": self.step, **figures}
        self.history.append(entry)
        self.metrics.update(figures)
        return entry

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
        options = [
            {key: value for key, value in group.items() if key != "params"}
            for optimizer in self.optimizers.values()
            for group in optimizer.param_groups
        ]
        self.restore(checkpoint)
        for name, parameter in self.method.named_parameters():
            if name in fixed:
                parameter.copy_(fixed[name])
        groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        for group, own in zip(groups, options, strict=True):
            group.update(own)
