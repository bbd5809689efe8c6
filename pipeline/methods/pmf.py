"""P>M>F: pretrained, meta-trained, fine-tuned (Hu, Li, Stuehmer, Kim & Hospedales 2022)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.functional.inner_loop import Parameters, gradient, out_of_inference, tasks_by, vmap_tasks
from pipeline.functional.losses import cross_entropy
from pipeline.functional.views import drawn, recoloured, shifted
from pipeline.methods._tuned import Adam
from pipeline.methods.base import State
from pipeline.methods.prototypical import Prototypical
from pipeline.nets.by_name import choose


class PMF(Prototypical):
    """Prototypes by cosine, of a pretrained backbone; at test all its weights are tuned to the support's own views.

    Logits are tau cos(f(x), c). A step of fine-tuning takes randomly shifted, mirrored and recoloured copies of the
    support for queries, and the loss that training has. Its rate is chosen on validation episodes, and 0 among the
    candidates leaves the network as it is (section 3).

    Published on 5-way CIFAR-FS, 1-shot / 5-shot, with a ViT-S that DINO pretrained: 81.1 / 92.5.

    Args:
        backbone: f, pretrained: ``backbone.weights``, or ``initial`` of the run.
        scale: start of tau (10 in the authors' code).
        learn_scale, joint_forward: see :class:`Prototypical`.
        rates: of which validation episodes choose the one that new tasks are tuned with, the first where some are
            equal; validation during training goes by the first alone.
        rate_episodes: on which they are compared (5 in the authors' code).
        steps: of Adam for every task.
        probability: with which a step's queries are augmented; otherwise they are the support itself.
        tasks: are tuned by a "loop", by "vmap", or "auto": by device.
    """

    rate: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        scale: float = 10.0,
        learn_scale: bool = True,
        joint_forward: bool = True,
        rates: Sequence[float] = (0.0, 0.0001, 0.001, 0.01),
        rate_episodes: int = 5,
        steps: int = 50,
        probability: float = 0.9,
        tasks: str = "auto",
    ) -> None:
        super().__init__(backbone, "cosine", scale, learn_scale, joint_forward)
        if not rates or min(rates) < 0 or rate_episodes < 1 or steps < 1 or not 0 <= probability <= 1:
            raise PipelineError(
                f"rates={list(rates)} must be at least one, none below 0, rate_episodes={rate_episodes} and "
                f"steps={steps} at least 1, and probability={probability} in [0, 1]"
            )
        self.candidates, self.candidate_episodes = tuple(map(float, rates)), rate_episodes
        self.steps, self.probability = steps, probability
        self.tasks = choose("tasks", tasks, ("auto", "loop", "vmap"))
        self.register_buffer("rate", torch.tensor(self.candidates[0], dtype=torch.float64))

    @property
    def embeds_once(self) -> bool:  # type: ignore[override]
        """Where no task is tuned, it is a prototypical network, with all that such a one allows."""
        return not self.rate

    @property
    def task_by_task(self) -> bool:  # type: ignore[override]
        return not self.embeds_once and bool(self._tunable())

    @property
    def extendable(self) -> bool:  # type: ignore[override]
        return not self.rate

    def settle(self, candidate: float) -> None:
        self.rate.fill_(candidate)

    def adapt(self, support: Tensor, labels: Tensor, way: int | None = None) -> State:
        """Prototypes [T, way, D]; where there is a rate, the tuned weights of every task [T, ...] beside them."""
        if self.training or not self.rate or not self._tunable():
            return super().adapt(support, labels, way)
        way = self.check_support(labels, way)
        with out_of_inference(support, labels) as given, torch.no_grad():
            each_task = tasks_by(self.tasks, support)
            places = drawn(support.shape[1], self.steps, 6)
            augmented = (drawn(1, self.steps, 1, seed=1).flatten() < self.probability).tolist()
            steps = list(zip(places, augmented, strict=True))
            return each_task(partial(self._tuned, way, each_task is vmap_tasks, steps), *given)

    def classify(self, state: State, query: Tensor) -> Tensor:
        if state.keys() <= {"prototypes", "counts"}:
            return super().classify(state, query)
        return tasks_by(self.tasks, query)(self._answers, state, query)

    def _tuned(
        self, way: int, mapped: bool, steps: list[tuple[Tensor, bool]], support: Tensor, labels: Tensor
    ) -> State:
        """One task: support [S, C, H, W] and labels [S]; of every step, how the support is augmented, and whether."""
        weights, adam = self._tunable(), Adam(float(self.rate))
        for place, augmented in steps:
            query = self._view(support, place) if augmented else support
            gradients, _ = gradient(partial(self._loss, support, query, labels, way), weights, mapped)
            weights = adam.step(weights, gradients)
        found = self.fit(self._embedded(weights, support)[None], labels[None], way)
        return {**weights, **{name: value[0] for name, value in found.items()}}

    def _tunable(self) -> Parameters:
        """The weights of the backbone that are not frozen."""
        return {name: p.detach() for name, p in self.backbone.named_parameters() if p.requires_grad}

    def _view(self, support: Tensor, place: Tensor) -> Tensor:
        """Recoloured, and shifted by at most an eighth of the image."""
        return shifted(recoloured(support, place[:, 3:]), place[:, :3], int(support.shape[-1] / 8 + 0.5))

    def _loss(
        self, support: Tensor, query: Tensor, labels: Tensor, way: int, weights: Parameters
    ) -> tuple[Tensor, Parameters]:
        features = self._embedded(weights, torch.cat([support, query]))[None]
        state = self.fit(features[:, : len(support)], labels[None], way)
        return cross_entropy(self.scores(state, features[:, len(support) :]), labels[None]), {}

    def _answers(self, state: State, query: Tensor) -> Tensor:
        """Logits [Q, way] of one task."""
        features = self._embedded({k: v for k, v in state.items() if k not in ("prototypes", "counts")}, query)
        return self.scores({"prototypes": state["prototypes"][None]}, features[None])[0]

    def _embedded(self, weights: Parameters, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, D] with the given weights."""
        return torch.func.functional_call(self.backbone, weights, (images,))
