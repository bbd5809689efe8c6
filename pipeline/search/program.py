"""Trials that differ in scalars alone as one program: every operation has a leading dimension of trials.

What a trial's step costs beside arithmetic, the launch of some hundred operations, is paid once for all of them. Where
arithmetic is the larger part it is a loss: weights of its own for every trial make convolutions grouped, which a CPU is
slow at.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.training.learner import Figures, Learner


class Program:
    """The gradients of several learners that :func:`alike` finds alike, at the same step and on the same batch.

    It takes the place of their ``backward``: the first that is asked computes for all, before any of them moves. A
    learner ends with the weights it would have alone but for rounding; where its network has dropout, masks are common
    to all, and others than it would draw alone.
    """

    def __init__(self, learners: Sequence[Learner]) -> None:
        self.learners = list(learners)
        first = learners[0].method
        self._template = copy.deepcopy(first).train()
        self._scalars = {
            name: torch.tensor([getattr(learner.method, name) for learner in learners], dtype=torch.float64)
            for name in first.scalars or ()
            if isinstance(getattr(first, name), float | int)  # a parameter is stacked with the others
        }
        self._step = -1
        self._gradients: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._figures: Figures = {}
        for number, learner in enumerate(learners):
            learner.backward = partial(self._backward, number)

    def _backward(self, number: int, batch: Batch, phase: str) -> Figures:
        learner = self.learners[number]
        if self._step != learner.step:
            self._compute(batch, phase)
            self._step = learner.step
        for name, parameter in learner.method.named_parameters():
            parameter.grad = self._gradients[name][number] if name in self._gradients else None
        with torch.no_grad():
            for name, buffer in learner.method.named_buffers():
                buffer.copy_(self._buffers[name][number])
        return {name: values[number] for name, values in self._figures.items()}

    def _compute(self, batch: Batch, phase: str) -> None:
        methods = [learner.method.train() for learner in self.learners]
        parameters, self._buffers = torch.func.stack_module_state(list[nn.Module](methods))

        def one(
            own: dict[str, Tensor], buffers: dict[str, Tensor], scalars: dict[str, Tensor]
        ) -> tuple[Tensor, Figures]:
            for name, value in scalars.items():
                setattr(self._template, name, value)
            found: tuple[Tensor, Figures] = torch.func.functional_call(self._template, (own, buffers), (batch, phase))
            return found

        scalars = {name: values.to(self.learners[0].device) for name, values in self._scalars.items()}
        with self.learners[0].autocast():
            losses, figures = torch.func.vmap(one, randomness="same")(parameters, self._buffers, scalars)
        losses.sum().backward()  # no trial's loss depends on another's weights
        trained = {name for name, parameter in methods[0].named_parameters() if parameter.requires_grad}
        self._gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None and n in trained}
        self._figures = {"loss": losses.detach(), **figures}


def alike(learner: Learner) -> str | None:
    """What learners have in common that can be one program; None where a learner cannot be part of one."""
    method, config = learner.method, learner.config
    scalars = vars(type(method)).get("scalars")  # its own: what a class makes of a batch, another built on it may not
    if scalars is None or config.compile or len(method.phases) > 1:
        return None
    options = dict(learner.spec["method"])
    for name in scalars:  # some are no part of the computation where they are 0
        options[name] = bool(options.get(name, getattr(method, name)))
    return repr(({**learner.spec, "method": sorted(options.items())}, config.precision, config.augmentation))


def pays(learner: Learner) -> bool:
    """Whether one program is faster than one after the other: on a GPU, and everywhere without convolutions."""
    convolutional = any(isinstance(m, nn.modules.conv._ConvNd) for m in learner.method.modules())
    return learner.device.type == "cuda" or not convolutional


def arrange(learners: Iterable[Learner], batched: bool | None) -> list[Program]:
    """Programs for those learners that are to be trained as one; the others get their own ``backward`` back.

    Args:
        batched: None: where it pays; true: where it is possible; false: nowhere.
    """
    groups: dict[str, list[Learner]] = {}
    for learner in learners:
        learner.backward = learner.own_backward
        key = alike(learner)
        if key is not None and (pays(learner) if batched is None else batched):
            groups.setdefault(key, []).append(learner)
    return [Program(group) for group in groups.values() if len(group) > 1]
