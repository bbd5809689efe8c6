"""All weights of a network tuned to every task, with a new classifier on top."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.functional.distances import unit
from pipeline.functional.fine_tuning import initial_weights
from pipeline.functional.inner_loop import Parameters, loop_tasks, vmap_tasks
from pipeline.functional.losses import PADDING, cross_entropy
from pipeline.functional.support_initialised import direction_scores, mean_entropy, support_weights
from pipeline.methods.base import State
from pipeline.nets.norm import batch_norms, recorded_statistics

Loss = Callable[[Parameters], tuple[Tensor, Parameters]]  # a scalar, and what else comes out of the forward pass
BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Tuner:
    """What :class:`pipeline.methods.baseline.Baseline` does to its network for a task; its options are explained there.

    ``initialisation`` is "random" for Ravi's fine-tuning (by gradient descent) or Dhillon's (by Adam).
    """

    network: nn.Module  # with "backbone" and, used by "dhillon", "classifier"
    initialisation: str
    epochs: int
    lr: float
    lr_decay: float
    entropy: str
    entropy_weight: float
    batch_norm: bool
    tasks: str

    @property
    def transductive(self) -> bool:
        return self.initialisation != "random" and self.entropy == "query" and self.epochs > 0

    def start(self, embeddings: Tensor, labels: Tensor, way: int) -> State:
        """weight [T, way, D] and bias [T, way] of the new classifier, before any step.

        Args:
            embeddings: [T, S, D] as :meth:`representation` has them.
        """
        weight, bias = initial_weights(way, embeddings.shape[-1])
        tasks = len(embeddings)
        if self.initialisation == "random":
            weight = weight.to(embeddings).expand(tasks, -1, -1)
            return {"weight": weight, "bias": bias.to(embeddings).expand(tasks, -1)}
        weight = support_weights(embeddings, labels, way)
        return {"weight": weight, "bias": weight.new_zeros(tasks, way)}

    def tune(self, start: State, support: Tensor, labels: Tensor, query: Tensor | None = None) -> State:
        """The tuned weights [T, ...] by name and, with ``batch_norm``, running averages by theirs."""
        with torch.inference_mode(False), torch.no_grad():
            images = [x.clone() if x.is_inference() else x for x in (support, labels, query) if x is not None]
            start = {name: value.clone() if value.is_inference() else value for name, value in start.items()}
            vmapped = self.tasks == "vmap" or (self.tasks == "auto" and support.is_cuda)
            each_task = vmap_tasks if vmapped else loop_tasks
            found: State = each_task(partial(self._tune_one, vmapped), start, *images)
        return found

    def answer(self, state: State, query: Tensor) -> Tensor:
        """Logits [T, Q, way] of queries [T, Q, C, H, W] by tuned weights."""
        each_task = vmap_tasks if self.tasks == "vmap" or (self.tasks == "auto" and query.is_cuda) else loop_tasks
        return each_task(self._scores, state, query)

    def representation(self, features: Tensor, classified: Tensor | None = None) -> Tensor:
        """What the new classifier looks at: features [..., D], or scores of the training classes [..., classes]."""
        if self.initialisation == "dhillon":
            return F.relu(self.network.classifier(features) if classified is None else classified)  # type: ignore[operator]
        return F.relu(features) if self.initialisation == "features" else features

    def scores(self, state: State, represented: Tensor) -> Tensor:
        """Logits [..., N, way] of the new classifier."""
        weight, bias = state["weight"], state["bias"]
        if self.initialisation == "random":
            return represented @ weight.mT + bias.unsqueeze(-2)
        return direction_scores(represented, unit(weight) if self.initialisation == "blog" else weight, bias)

    def _tune_one(
        self, mapped: bool, start: State, support: Tensor, labels: Tensor, query: Tensor | None = None
    ) -> State:
        """One task: support [S, C, H, W], labels [S] and, where transductive, queries [Q, C, H, W]."""
        weights = {**{name: p.detach() for name, p in self._tuned_parameters()}, **start}
        averages = self._averages()
        moments = Moments.zeros(weights)
        terms = [partial(self._fit, support, labels)]
        if self.initialisation != "random" and self.entropy != "none":
            images, counted = (query, None) if query is not None else (support, labels != PADDING)
            terms.append(partial(self._doubt, images, counted))
        for epoch in range(self.epochs):
            for term in terms:
                gradients, seen = gradient(term, weights, mapped)
                if self.initialisation == "random":
                    weights = sgd_step(weights, gradients, self.lr / (1 + self.lr_decay * epoch))
                else:
                    weights, moments = adam_step(weights, gradients, moments, self.lr)
                for name, value in seen.items():
                    share = self._momentum(name)
                    averages[name] = (1 - share) * averages[name] + share * value
        return {**weights, **(averages if self.batch_norm else {})}

    def _fit(self, images: Tensor, labels: Tensor, weights: Parameters) -> tuple[Tensor, Parameters]:
        """Cross-entropy of the support."""
        scores, seen = self._training_scores(weights, images)
        return cross_entropy(scores, labels), seen

    def _doubt(self, images: Tensor, counted: Tensor | None, weights: Parameters) -> tuple[Tensor, Parameters]:
        """The entropy term."""
        scores, seen = self._training_scores(weights, images)
        return self.entropy_weight * mean_entropy(scores, counted), seen

    def _training_scores(self, weights: Parameters, images: Tensor) -> tuple[Tensor, Parameters]:
        """Logits [N, way] and, with ``batch_norm``, the statistics that enter the running averages."""
        if not self.batch_norm:
            return self._scores(weights, images), {}
        seen: Parameters = {}
        with self._recording(seen):
            scores = self._scores(weights, images)
        return scores, seen

    def _scores(self, weights: Parameters, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, way] with the given weights and averages."""

        def part(prefix: str) -> Parameters:
            return {n.removeprefix(prefix): value for n, value in weights.items() if n.startswith(prefix)}

        features = torch.func.functional_call(self.network.backbone, part("backbone."), (images,))  # type: ignore[arg-type]
        classified = None
        if self.initialisation == "dhillon":
            classified = torch.func.functional_call(self.network.classifier, part("classifier."), (features,))  # type: ignore[arg-type]
        return self.scores(weights, self.representation(features, classified))

    def _tuned_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.network.named_parameters():
            if name.startswith("backbone.") or (name.startswith("classifier.") and self.initialisation == "dhillon"):
                yield name, parameter

    def _averages(self) -> Parameters:
        """The running averages of batch-norm by name."""
        if not self.batch_norm:
            return {}
        named = dict(self.network.named_buffers())
        kinds = ("running_mean", "running_var")
        layers = [f"backbone.{name}" for name, layer in batch_norms(self.network.backbone).items() if layer.running]  # type: ignore[arg-type]
        return {f"{layer}.{kind}": named[f"{layer}.{kind}"] for layer in layers for kind in kinds}

    def _momentum(self, name: str) -> float:
        return float(self.network.get_submodule(name.rpartition(".")[0]).momentum)  # type: ignore[arg-type]

    @contextmanager
    def _recording(self, seen: Parameters) -> Iterator[None]:
        """Within: batch-norm goes by the batch, whose mean and unbiased variance are then in ``seen``."""
        backbone: nn.Module = self.network.backbone  # type: ignore[assignment]
        values: dict[str, int] = {}  # a channel has in the batch

        def count(name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            values[name] = given[0].numel() // given[0].shape[1]

        layers = {name: layer for name, layer in batch_norms(backbone).items() if layer.running}
        hooks = [layer.register_forward_pre_hook(partial(count, name)) for name, layer in layers.items()]
        try:
            with recorded_statistics(backbone) as statistics:
                yield
        finally:
            for hook in hooks:
                hook.remove()
        for name, number in values.items():
            seen[f"backbone.{name}.running_mean"] = statistics[f"{name}.mean"]
            seen[f"backbone.{name}.running_var"] = statistics[f"{name}.var"] * (number / (number - 1))


class Moments(NamedTuple):
    """Running averages of the gradient and of its square, by name of the parameter."""

    first: Parameters
    second: Parameters
    steps: int

    @classmethod
    def zeros(cls, parameters: Parameters) -> Moments:
        first, second = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
        return cls(first, second, 0)


def gradient(loss: Loss, parameters: Parameters, mapped: bool) -> tuple[Parameters, Parameters]:
    """The gradient of ``loss`` and what else it returns, as values without a graph.

    Args:
        mapped: whether this runs under ``vmap``.
    """
    if mapped:
        found: tuple[Parameters, Parameters] = torch.func.grad(loss, has_aux=True)(parameters)
        return found
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        value, other = loss(leaves)
        gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True)), {name: value.detach() for name, value in other.items()}


def sgd_step(parameters: Parameters, gradients: Parameters, lr: float) -> Parameters:
    return {name: value - lr * gradients[name] for name, value in parameters.items()}


def adam_step(parameters: Parameters, gradients: Parameters, moments: Moments, lr: float) -> tuple[Parameters, Moments]:
    """A step of Adam (Kingma & Ba 2015) in PyTorch's form, epsilon beside the corrected root::

    m = .9 m + .1 g    v = .999 v + .001 g^2    theta -= lr m / (1 - .9^t) / (sqrt(v / (1 - .999^t)) + 1e-8)
    """
    steps, (beta1, beta2) = moments.steps + 1, BETAS
    first = {n: beta1 * m + (1 - beta1) * gradients[n] for n, m in moments.first.items()}
    second = {n: beta2 * v + (1 - beta2) * gradients[n].square() for n, v in moments.second.items()}
    size, root = lr / (1 - beta1**steps), (1 - beta2**steps) ** 0.5
    moved = {n: p - size * first[n] / (second[n].sqrt() / root + EPS) for n, p in parameters.items()}
    return moved, Moments(first, second, steps)
