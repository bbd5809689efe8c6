"""The contract of a few-shot method: three verbs, each over a batch of tasks at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.batch import Batch, Episodes
from pipeline.errors import PipelineError

State = dict[str, Tensor]  # what a method learnt from a support set; every tensor leads with the tasks [T, ...]


class Method(nn.Module):
    """A few-shot method around a backbone.

    A subclass implements :meth:`adapt` and :meth:`classify`; :meth:`loss` is, unless it is overridden, the
    cross-entropy of ``classify(adapt(support), query)``. ``forward`` is ``loss``, so that
    ``DistributedDataParallel`` sees the gradient of every parameter.
    """

    regime: ClassVar[str] = "episodic"  # or "classical": trained on batches of labelled images
    fixed_way: int | None = None  # the only number of classes the method can answer for; None: any

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def adapt(self, support: Tensor, labels: Tensor, way: int | None = None) -> State:
        """Learn from the support sets of T tasks.

        Args:
            support: float [T, S, C, H, W], preprocessed images.
            labels: int64 [T, S], 0..way-1 in any order and with any number of images a class.
            way: number of classes; by default one more than the largest label.
        """
        raise NotImplementedError

    def classify(self, state: State, query: Tensor) -> Tensor:
        """Logits [T, Q, way] of the queries [T, Q, C, H, W], for a state that ``adapt`` returned."""
        raise NotImplementedError

    def extend(self, state: State, support: Tensor, labels: Tensor) -> State | None:
        """Add classes to a state without touching those it has; None where the method cannot.

        Args:
            support: float [T, S, C, H, W], images of the new classes only.
            labels: int64 [T, S], numbered on from the classes of ``state``.
        """
        return None

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What training minimises, and figures to log (detached scalars, "accuracy" among them)."""
        assert isinstance(batch, Episodes)
        state = self.adapt(batch.support, batch.support_labels, batch.way)
        logits = self.classify(state, batch.query)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.query_labels.flatten())
        return loss, {"accuracy": accuracy(logits, batch.query_labels)}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(batch)

    def parameter_groups(self) -> Iterator[dict[str, Any]]:
        """Groups for the optimizer. ``lr_scale`` multiplies the run's learning rate; other keys are the optimizer's."""
        yield {"params": list(self.parameters()), "lr_scale": 1.0}

    def after_step(self) -> None:
        """Called after every optimizer step, for constraints on the weights."""

    def check_way(self, way: int) -> None:
        if self.fixed_way is not None and way != self.fixed_way:
            name = type(self).__name__
            raise PipelineError(f"{name} was built for {self.fixed_way} classes and cannot answer for {way}: train it with that way")


def embed(backbone: nn.Module, images: Tensor) -> Tensor:
    """Embed [T, N, C, H, W] in one call: [T, N, D]."""
    return backbone(images.flatten(0, 1)).unflatten(0, images.shape[:2])


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers over all tasks, detached."""
    return (logits.detach().argmax(-1) == labels).float().mean()


def one_hot(labels: Tensor, way: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[T, S, way] indicator; a label outside 0..way-1 (padding) gives a row of zeros."""
    return (labels.unsqueeze(-1) == torch.arange(way, device=labels.device)).to(dtype)
