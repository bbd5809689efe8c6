"""MAML++ (Antoniou, Edwards & Storkey 2019): MAML with a loss after every inner step and learnt step sizes."""

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Episodes
from pipeline.errors import PipelineError
from pipeline.functional.inner_loop import Parameters, gradient, vmap_tasks
from pipeline.functional.losses import accuracy, labelled, summed_cross_entropy
from pipeline.methods._fast_weights import at_least_one
from pipeline.methods.base import State
from pipeline.methods.maml import MAML
from pipeline.nets.norm import batch_norms

FLOOR = 0.03  # of the query losses of the inner steps: what all but the last keep at least, times 1 / steps


class MAMLPlusPlus(MAML):
    """MAML whose training has been made stable (section 4).

    The multi-step loss (MSL) weighs the query loss after every inner step; the rates of the inner loop are learnt per
    tensor and step (LSLR); batch-norm has its own gain and bias for every inner step (BNWB) and always uses batch
    statistics; inner gradients may be of first order at first (DA). Gain and bias are not changed by the inner loop.
    Losses are means over images.

    The published 52.15 / 68.32 on mini-ImageNet and 99.47 / 99.93 / 97.65 / 99.33 on Omniglot were made with second
    order from the start (``first_order_epochs=0``, as every released configuration; the text says 50), backbones with
    ``negative_slope=0.01 init=xavier bias=true`` of width 64 (Omniglot) or 48, and Adam 1e-3 over 100
    epochs of 500 steps, on Omniglot with ``schedule=cosine schedule.final=0.01``; they are of the mean of the
    predictions of the five best checkpoints, which is not taken here.

    Args:
        inner_lr: what every inner rate begins with (.1 for Omniglot, .01 for mini-ImageNet).
        inner_steps, inner_steps_eval: number of inner steps in training and in evaluation, where there may be fewer:
            every step has its own rates and rows of batch-norm.
        learn_inner_lr: train the inner rates. Each is a vector of ``inner_steps`` + 1, as in the official code; the
            last is never used.
        multi_step_epochs: epochs of the multi-step loss (10 for Omniglot, 15 for mini-ImageNet); after them the loss is
            that of the last step. 0: never.
        per_step_norm: batch-norm's own gain and bias for every inner step; false: the same for all.
        first_order_epochs: epochs in which inner gradients are constants.
        epoch_steps: training steps that make an epoch.
        transductive, inner_loop: see :class:`pipeline.methods.maml.MAML`; published with transductive.
    """

    steps_taken: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        way: int,
        inner_lr: float = 0.1,
        inner_steps: int = 5,
        inner_steps_eval: int = 5,
        learn_inner_lr: bool = True,
        multi_step_epochs: int = 10,
        per_step_norm: bool = True,
        first_order_epochs: int = 0,
        epoch_steps: int = 500,
        transductive: bool = True,
        inner_loop: str = "auto",
    ) -> None:
        at_least_one(inner_steps=inner_steps, inner_steps_eval=inner_steps_eval, epoch_steps=epoch_steps)
        if inner_steps_eval > inner_steps:
            raise PipelineError(
                f"inner_steps_eval={inner_steps_eval} is more than inner_steps={inner_steps}: "
                "later steps have no learnt rates"
            )
        super().__init__(
            backbone,
            way,
            inner_lr,
            inner_steps,
            inner_steps_eval,
            loss_scaling="mean",
            adapt_parameters="all_but_norm",
            transductive=transductive,
            inner_loop=inner_loop,
        )
        self.multi_step_epochs, self.first_order_epochs = multi_step_epochs, first_order_epochs
        self.epoch_steps = epoch_steps
        self._rows = self._give_every_step_its_norm() if per_step_norm else frozenset()
        rates = {_rate(name): torch.full((inner_steps + 1,), float(inner_lr)) for name in sorted(self._adapted)}
        self.rates = nn.ParameterDict({n: nn.Parameter(r, requires_grad=learn_inner_lr) for n, r in rates.items()})
        self.register_buffer("steps_taken", torch.tensor(0))

    def clipped(self) -> Iterator[nn.Parameter]:
        """The official code bounds the gradients of the network and not those of the inner rates."""
        return (parameter for name, parameter in self.named_parameters() if not name.startswith("rates."))

    @property
    def epoch(self) -> int:
        return int(self.steps_taken) // self.epoch_steps

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over tasks of the weighted mean over inner steps of the query loss."""
        assert isinstance(batch, Episodes)
        if not self.training:
            return super().loss(batch)
        self.check_support(batch.support_labels, batch.way)
        epoch = self.epoch
        self.first_order = epoch < self.first_order_epochs
        weights = [1.0]
        if epoch < self.multi_step_epochs:
            weights = step_weights(self.inner_steps, epoch, self.multi_step_epochs)
        each_task = self._each_task(batch.support)
        answers_one = partial(self._answers_one, self._start(), each_task is vmap_tasks, len(weights))
        logits = each_task(answers_one, batch.support, batch.support_labels, batch.query)
        labels = batch.query_labels.unsqueeze(1).expand(logits.shape[:-1])  # [T, steps, Q]
        losses = summed_cross_entropy(logits, labels) / labelled(labels)
        loss = (losses * losses.new_tensor(weights)).sum(1).mean()
        return loss, {"accuracy": accuracy(logits[:, -1], batch.query_labels)}

    def extractor(self) -> nn.Module:
        """The backbone as the first inner step finds it, with that step's gain and bias."""
        if not self._rows:
            return self.backbone
        backbone = copy.deepcopy(self.backbone)
        for layer in batch_norms(backbone).values():
            for name, rows in list(layer.named_parameters()):
                setattr(layer, name, nn.Parameter(rows.detach()[0].clone()))
        return backbone

    @torch.no_grad()
    def after_step(self) -> None:
        self.steps_taken += 1

    def _answers_one(
        self, start: Parameters, mapped: bool, last: int, support: Tensor, labels: Tensor, query: Tensor
    ) -> Tensor:
        """One task: logits [last, Q, way] of the queries after each of the ``last`` last inner steps."""
        answers = []
        for parameters in list(self._trajectory(start, mapped, support, labels))[-last:]:
            state = parameters | self._statistics(parameters, support)
            answers.append(self._classify_one(state, query))
        return torch.stack(answers)

    def _adapt_one(self, start: Parameters, mapped: bool, support: Tensor, labels: Tensor) -> State:
        *_, end = self._trajectory(start, mapped, support, labels)
        kept = {name: value for name, value in end.items() if name in self._adapted | self._rows}
        return kept | self._statistics(end, support)

    def _trajectory(self, start: Parameters, mapped: bool, support: Tensor, labels: Tensor) -> Iterator[Parameters]:
        """One task: all parameters after every inner step, with that step's rows of batch-norm."""
        adapted = {name: value for name, value in start.items() if name in self._adapted}
        second_order = self.training and not self.first_order
        for step in range(self.inner_steps if self.training else self.inner_steps_eval):
            fixed = {name: value[step] if name in self._rows else value for name, value in start.items()}

            def loss(parameters: Parameters, fixed: Parameters = fixed) -> tuple[Tensor, State]:
                logits = self._logits({**fixed, **parameters}, support)
                return summed_cross_entropy(logits, labels) / labelled(labels), {}

            found, _ = gradient(loss, adapted, mapped, second_order)
            adapted = {n: value - start[f"rates.{_rate(n)}"][step] * found[n] for n, value in adapted.items()}
            yield {**fixed, **adapted}

    def _give_every_step_its_norm(self) -> frozenset[str]:
        """Make gain and bias of every batch-norm layer [inner_steps, C]; their names."""
        rows = set()
        for layer_name, layer in batch_norms(self.backbone).items():
            for name, value in list(layer.named_parameters()):
                every = nn.Parameter(value.detach().repeat(self.inner_steps, 1), value.requires_grad)
                setattr(layer, name, every)
                rows.add(f"backbone.{layer_name}.{name}")
        return frozenset(rows)


def _rate(name: str) -> str:
    """The key of a parameter's inner rates: a ParameterDict allows no dots."""
    return name.replace(".", "-")


def step_weights(steps: int, epoch: int, epochs: int) -> list[float]:
    """v_s of the losses after inner steps 1..``steps``, which sum to 1 (equation 4, annealed as the official code).

    At epoch 0 all are equal. In ``epochs`` epochs those before the last fall linearly, to no less than ``FLOOR`` /
    ``steps``, and the last takes what they lose.
    """
    fallen = epoch / (steps * epochs)
    early = max(1 / steps - fallen, FLOOR / steps)
    last = min(1 / steps + fallen * (steps - 1), 1 - (steps - 1) * FLOOR / steps)
    return [early] * (steps - 1) + [last]
