"""All weights of a network tuned to every task, with a new classifier on top."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.functional.distances import unit
from pipeline.functional.fine_tuning import initial_weights
from pipeline.functional.inner_loop import Parameters, gradient, out_of_inference, part, tasks_by, vmap_tasks
from pipeline.functional.losses import PADDING, cross_entropy
from pipeline.functional.prototypes import prototypes
from pipeline.functional.support_initialised import direction_scores, mean_entropy
from pipeline.methods.base import State
from pipeline.methods.head import ClassicalMethod
from pipeline.nets.norm import batch_norms, recorded_statistics

BETAS, EPS = (0.9, 0.999), 1e-8
AVERAGES = "running_mean", "running_var"


@dataclass(frozen=True)
class Tuner:
    """What :class:`pipeline.methods.baseline.Baseline` does to its network for a task; its options are explained there.

    ``initialisation`` is "random" for Ravi's fine-tuning (by gradient descent) or Dhillon's (by Adam).
    """

    network: ClassicalMethod
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
        weight = unit(prototypes(embeddings, labels, way)[0])  # the direction of each class's mean (equation 6)
        return {"weight": weight, "bias": weight.new_zeros(tasks, way)}

    def tune(self, start: State, support: Tensor, labels: Tensor, query: Tensor | None = None) -> State:
        """The tuned weights [T, ...] by name and, with ``batch_norm``, running averages by theirs."""
        given = [*start.values(), support, labels, *([] if query is None else [query])]
        with out_of_inference(*given) as given, torch.no_grad():
            each_task = tasks_by(self.tasks, support)
            start = dict(zip(start, given, strict=False))
            return each_task(partial(self._tune_one, each_task is vmap_tasks), start, *given[len(start) :])

    def answer(self, state: State, query: Tensor) -> Tensor:
        """Logits [T, Q, way] of queries [T, Q, C, H, W] by tuned weights."""
        return tasks_by(self.tasks, query)(self._scores, state, query)

    def representation(self, features: Tensor, classified: Tensor | None = None) -> Tensor:
        """What the new classifier looks at: features [..., D], or scores of the training classes [..., classes]."""
        if self.initialisation == "dhillon":
            return F.relu(self.network.classifier(features) if classified is None else classified)
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
        tuned = ("backbone.", "classifier.") if self.initialisation == "dhillon" else "backbone."
        weights = {name: p.detach() for name, p in self.network.named_parameters() if name.startswith(tuned)} | start
        layers = batch_norms(self.network.backbone)
        running = [name for name, layer in layers.items() if layer.running and self.batch_norm]
        averages = {f"{name}.{kind}": getattr(layers[name], kind) for name in running for kind in AVERAGES}
        adam = Adam(self.lr)
        terms = [partial(self._fit, support, labels)]
        if self.initialisation != "random" and self.entropy != "none":
            images, counted = (query, None) if query is not None else (support, labels != PADDING)
            terms.append(partial(self._doubt, images, counted))
        for epoch in range(self.epochs):
            for term in terms:
                gradients, seen = gradient(term, weights, mapped)
                if self.initialisation == "random":
                    rate = self.lr / (1 + self.lr_decay * epoch)
                    weights = {name: value - rate * gradients[name] for name, value in weights.items()}
                else:
                    weights = adam.step(weights, gradients)
                for name, value in seen.items():
                    share = layers[name.rpartition(".")[0]].momentum
                    averages[name] = (1 - share) * averages[name] + share * value
        return weights | {f"backbone.{name}": value for name, value in averages.items()}

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
        values: dict[str, int] = {}  # a channel has in the batch
        with recorded_statistics(self.network.backbone, values) as statistics:
            scores = self._scores(weights, images)
        layers, seen = batch_norms(self.network.backbone), Parameters()
        for name, number in values.items():
            if layers[name].running:
                seen[f"{name}.running_mean"] = statistics[f"{name}.mean"]
                seen[f"{name}.running_var"] = statistics[f"{name}.var"] * (number / (number - 1))
        return scores, seen

    def _scores(self, weights: Parameters, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, way] with the given weights and averages."""
        features = torch.func.functional_call(self.network.backbone, part(weights, "backbone."), (images,))
        classified = None
        if self.initialisation == "dhillon":
            own = part(weights, "classifier.")
            classified = torch.func.functional_call(self.network.classifier, own, (features,))
        return self.scores(weights, self.representation(features, classified))


class Adam:
    """Adam (Kingma & Ba 2015) in PyTorch's form, epsilon beside the corrected root::

    m = .9 m + .1 g    v = .999 v + .001 g^2    theta -= lr m / (1 - .9^t) / (sqrt(v / (1 - .999^t)) + 1e-8)
    """

    def __init__(self, lr: float) -> None:
        self.lr, self.steps = lr, 0
        self.first, self.second = Parameters(), Parameters()  # by name of the parameter; zeros at first

    def step(self, parameters: Parameters, gradients: Parameters) -> Parameters:
        self.steps += 1
        beta1, beta2 = BETAS
        size, root = self.lr / (1 - beta1**self.steps), (1 - beta2**self.steps) ** 0.5
        moved = {}
        for name, g in gradients.items():
            m = self.first[name] = beta1 * self.first.get(name, 0.0) + (1 - beta1) * g
            v = self.second[name] = beta2 * self.second.get(name, 0.0) + (1 - beta2) * g.square()
            moved[name] = parameters[name] - size * m / (v.sqrt() / root + EPS)
        return moved
