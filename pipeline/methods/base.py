"""The contract of a few-shot method: three verbs, each over a batch of tasks at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Episodes, Images
from pipeline.errors import PipelineError
from pipeline.functional.losses import PADDING, accuracy, cross_entropy
from pipeline.functional.prototypes import one_hot
from pipeline.nets.norm import looks_at_the_batch
from pipeline.nets.pieces import in_pieces

State = dict[str, Tensor]  # what a method learnt from a support set; every tensor leads with the tasks [T, ...]


class Method(nn.Module):
    """A few-shot method around a backbone.

    It is made of a ``backbone``, which gives the features, and, where its constructor names them, of the ``way`` and
    ``shot`` of training's episodes and the number of training ``classes``.

    A subclass implements :meth:`adapt` and :meth:`classify`; :meth:`loss` is, unless it is overridden, the
    cross-entropy of ``classify(adapt(support), query)``. ``forward`` is ``loss``, so that
    ``DistributedDataParallel`` sees the gradient of every parameter.

    A method that is trained on labelled images beside the tasks says ``regime = "both"`` and has an
    :meth:`auxiliary_loss`: a training step then begins with a step of a second optimizer on it, with the probability
    that :meth:`auxiliary_probability` gives.
    """

    regime: str = "episodic"  # "classical": trained on batches of labelled images; "both": on tasks and on images
    extendable: bool = False  # classes can be added without touching the others: state tensors are [T, way, ...]
    embeds_once: bool = False  # in evaluation, sees an image through its backbone alone, whatever images are beside it
    task_by_task: bool = False  # in evaluation, no batch of its network holds images of two tasks
    candidates: tuple[float, ...] = ()  # of an option that validation episodes choose before a checkpoint is written
    candidate_episodes: int = 0  # which they do by
    fixed_way: int | None = None  # the only number of classes the method can answer for; None: any

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def width(self) -> int:
        """D, of the backbone's features."""
        return int(self.backbone.out_features)  # type: ignore[arg-type]

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

    def distances(self, logits: Tensor) -> Tensor | None:
        """The distances [T, Q, way] behind ``logits``, up to a factor; None where the method measures none."""
        return None

    def extend(self, state: State, support: Tensor, labels: Tensor) -> State | None:
        """Add classes to a state without touching those it has; None where the method is not ``extendable``.

        Args:
            support: float [T, S, C, H, W], images of the new classes only.
            labels: int64 [T, S], numbered on from the classes of ``state``.
        """
        if not self.extendable:
            return None
        known = next(iter(state.values())).shape[1]
        if int(labels.min()) < known:
            raise PipelineError(f"new classes are numbered from {known}, the number of classes already known")
        new = self.adapt(support, labels - known)
        return {key: torch.cat([state[key], new[key]], dim=1) for key in state}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What training minimises, and figures to log (detached scalars, "accuracy" among them)."""
        assert isinstance(batch, Episodes)
        state = self.adapt(batch.support, batch.support_labels, batch.way)
        logits = self.classify(state, batch.query)
        return cross_entropy(logits, batch.query_labels), {"accuracy": accuracy(logits, batch.query_labels)}

    def auxiliary_loss(self, images: Images) -> tuple[Tensor, dict[str, Tensor]]:
        """What the auxiliary step minimises, with figures to log; of methods whose regime is "both"."""
        raise NotImplementedError

    def auxiliary_probability(self, step: int, steps: int) -> float:
        """With which the auxiliary step is taken in step ``step`` of ``steps``."""
        return 1.0

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.regime == "both" and isinstance(batch, Images):
            return self.auxiliary_loss(batch)
        return self.loss(batch)

    def parameter_groups(self) -> Iterator[dict[str, Any]]:
        """Groups for the optimizer. ``lr_scale`` multiplies the run's learning rate; other keys are the optimizer's."""
        yield {"params": list(self.parameters()), "lr_scale": 1.0}

    def extractor(self) -> nn.Module:
        """The backbone by itself: features [N, D] of images [N, C, H, W], whatever learns from them."""
        return self.backbone

    def after_step(self) -> None:
        """Called after every optimizer step, for constraints on the weights."""

    def clipped(self) -> Iterator[nn.Parameter]:
        """Those whose gradients ``clip`` bounds."""
        return self.parameters()

    def begun_elsewhere(self, drawn: Collection[str]) -> None:
        """Called once before the first step of a run that begins with weights from elsewhere.

        Args:
            drawn: names of the parameters and buffers that did not come with them and are as the seed drew them.
        """

    def summarise(self, features: Tensor, labels: Tensor) -> Tensor | None:
        """What is to be summed over all training images before every checkpoint; None: nothing.

        Args:
            features: [N, D], the backbone's in evaluation mode, of images that are not augmented.
            labels: int64 [N] in 0..classes-1.

        Returns:
            float64, of the same shape for any N, 0 too.
        """
        return None

    @property
    def summarises(self) -> bool:
        return self.summarise(torch.zeros(0, self.width), torch.zeros(0, dtype=torch.int64)) is not None

    def keep_summary(self, total: Tensor, images: int) -> None:
        """Put away, in buffers, the sum of :meth:`summarise` over so many ``images``."""

    def settle(self, candidate: float) -> None:
        """Answer by one of the ``candidates`` from here on; it is kept in a buffer."""
        raise NotImplementedError

    def imitate(self, teacher: Method) -> None:
        """Take the trained ``teacher``, in evaluation mode, whose answers training goes by too.

        Of methods with an option ``teacher``, the checkpoint that it comes from. It becomes no part of this one: no
        weight of it is trained, or stored in a checkpoint.
        """
        raise NotImplementedError

    def check_batches(self, workers: int, grouping: Sequence[int] | None) -> None:
        """Refuse, before a run begins, so many workers or batches in groups of [classes, images] (``train.grouping``)
        that it cannot be trained by."""

    def check_way(self, way: int) -> None:
        if self.fixed_way is not None and way != self.fixed_way:
            raise PipelineError(
                f"{type(self).__name__} was built for {self.fixed_way} classes and cannot answer for {way}: "
                f"give it {self.fixed_way} classes, or train it with that way"
            )

    def check_support(self, labels: Tensor, way: int | None) -> int:
        """The number of classes of support labels [T, S], after refusing labels that no method can learn from.

        Values are looked at in evaluation only: training labels come from the episode plan, and reading them would
        make a GPU wait.
        """
        if way is None:
            way = int(labels.max()) + 1
        self.check_way(way)
        if not self.training:
            least, most = int(labels.min()), int(labels.max())
            if most >= way or least < PADDING:
                raise PipelineError(f"support labels must be in 0..{way - 1}, found {least}..{most}")
            shots = one_hot(labels, way).sum(1).amin(0)
            if int(shots.min()) == 0:
                raise PipelineError(f"class {int(shots.argmin())} of {way} has no support image")
        return way


def one_task_at_once(method: Method) -> bool:
    """Whether a task's answers would depend on the tasks beside it: batch statistics would be those of all of them."""
    return looks_at_the_batch(method) and not method.task_by_task


def embed(backbone: nn.Module, images: Tensor) -> Tensor:
    """Embed [T, N, C, H, W] without a loop over tasks: [T, N, D]."""
    return in_pieces(backbone, images.flatten(0, 1)).unflatten(0, images.shape[:2])
