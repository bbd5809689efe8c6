"""TADAM: task dependent adaptive metric (Oreshkin, Rodriguez & Lacoste 2018)."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.batch import Images
from pipeline.errors import PipelineError
from pipeline.functional.distances import by_class, euclidean, squared_euclidean_exact
from pipeline.functional.losses import accuracy, cross_entropy
from pipeline.functional.precision import in_float32
from pipeline.functional.prototypes import prototypes
from pipeline.methods.base import Method, State, embed
from pipeline.nets.by_name import choose
from pipeline.nets.film import film_of
from pipeline.nets.task_embedding import TaskEmbedding


@in_float32
def direction_distance(x: Tensor, y: Tensor, eps: float = 1e-6) -> Tensor:
    """||x / (||x|| + eps) - y / (||y|| + eps)||^2, twice one minus the cosine: x [..., Q, D], y [..., W, D]."""
    x, y = (v / (v.norm(dim=-1, keepdim=True) + eps) for v in (x, y))
    return squared_euclidean_exact(x, y)


METRICS = {"euclidean": euclidean, "squared_euclidean": squared_euclidean_exact, "cosine": direction_distance}


def l2_penalty(weights: Iterable[Tensor], scale: float) -> Tensor:
    """scale / 2 times the sum of squares, as TensorFlow: the gradient is that of an optimizer's weight_decay=scale."""
    return scale / 2 * torch.stack([w.square().sum() for w in weights]).sum()


def co_training_probability(step: int, steps: int, start: float = 0.9, decay: float = 0.9, times: int = 20) -> float:
    """Probability of the auxiliary task in step ``step`` of ``steps``: start * decay^floor(times * step / steps).

    The official code starts at .9, as the paper's text says; the paper's formula starts at 1.
    """
    return start * decay ** (times * step // steps)


class TADAM(Method):
    """Prototypes in a metric that is scaled, and features that are modulated by the task.

    The support is embedded, the mean of its prototypes tells the task, the task embedding network makes a gain and a
    shift of every channel from it, and support and queries are embedded with them: three passes with the same weights.
    Logits are -alpha d to the second prototypes. In some training steps, fewer and fewer, a classifier of all training
    classes on features without modulation is trained first, with an optimizer of its own.

    Published for 5-way 5-shot and ResNet-12: 76.7 on mini-ImageNet and 56.1 on FC100 with all three parts; on
    mini-ImageNet 74.2 with none of them (scale=1), 75.7 with the scale alone, 75.6 with the auxiliary task beside it,
    74.6 with conditioning beside it.

    Args:
        backbone: the features; for ``conditioning`` one that can be modulated.
        classes: number of training classes; needed for ``auxiliary``.
        metric: "euclidean", the norm of the difference, not squared (the code's heads "polynomial" of order 1 and, with
            scale 1, "prototypical"); "squared_euclidean"; "cosine": squared between unit vectors, so that alpha counts
            twice against one minus the cosine.
        scale: alpha, chosen by validation among .5, 1, 5, 7.5, 10 and 20 in the paper.
        learn_scale: train alpha with the network.
        conditioning: modulate the features by the task.
        multiplier_decay: weight decay of the scalars that multiply gains and shifts. All other decay is the
            optimizer's, and falls on the weights of the backbone's layers and of the task embedding network only.
        auxiliary: train a classifier of all training classes too.
        auxiliary_start: probability of that in the first step: .9 in the code and the paper's text, 1 in its formula.
        auxiliary_decay: factor of the probability after every twentieth of the steps.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int | None = None,
        metric: str = "euclidean",
        scale: float = 7.5,
        learn_scale: bool = False,
        conditioning: bool = True,
        multiplier_decay: float = 0.01,
        auxiliary: bool = True,
        auxiliary_start: float = 0.9,
        auxiliary_decay: float = 0.9,
    ) -> None:
        super().__init__(backbone)
        self.distance = METRICS[choose("metric", metric, METRICS)]
        self.scale = nn.Parameter(torch.tensor(float(scale)), requires_grad=learn_scale)
        self.multiplier_decay = multiplier_decay
        self.auxiliary_start, self.auxiliary_decay = auxiliary_start, auxiliary_decay
        self.task_embedding: TaskEmbedding | None = None
        self.classifier: nn.Linear | None = None
        if conditioning:
            widths = getattr(backbone, "film_widths", None)
            if not widths:
                raise PipelineError(
                    f"backbone {type(backbone).__name__} cannot be modulated: choose resnet12_tadam, conv4 or another "
                    "with film_widths, or set method.conditioning=false"
                )
            self.task_embedding = TaskEmbedding(self.width, widths)
        self.embeds_once = not conditioning
        self.extendable = not conditioning  # new classes make another task, which moves all prototypes
        if auxiliary:
            if classes is None:
                raise PipelineError("method.auxiliary=true needs the number of training classes")
            self.classifier = nn.Linear(self.width, classes)
            nn.init.xavier_uniform_(self.classifier.weight)
            nn.init.zeros_(self.classifier.bias)
        self.regime = "both" if auxiliary else "episodic"

    def adapt(self, support: Tensor, labels: Tensor, way: int | None = None) -> State:
        """prototypes [T, way, D] and, where features are modulated, gamma and beta [T, channels of all layers]."""
        way = self.check_support(labels, way)
        means, _ = prototypes(embed(self.backbone, support), labels, way)
        if self.task_embedding is None:
            return {"prototypes": means}
        gamma, beta = self.task_embedding(means.mean(1))
        state = {"gamma": gamma, "beta": beta}
        means, _ = prototypes(self._embed(state, support), labels, way)
        return {"prototypes": means, **state}

    def classify(self, state: State, query: Tensor) -> Tensor:
        """-alpha d, [T, Q, way]."""
        embeddings = self._embed(state, query)
        if self.training:
            return -self.scale * self.distance(embeddings, state["prototypes"])
        return -self.scale * by_class(self.distance, embeddings, state["prototypes"])  # `extend` touches no class

    def distances(self, logits: Tensor) -> Tensor:
        return -logits

    def auxiliary_loss(self, images: Images) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy over all training classes, of features that are not modulated."""
        assert self.classifier is not None
        logits = self.classifier(self.backbone(images.images))
        return cross_entropy(logits, images.labels), {"accuracy": accuracy(logits, images.labels)}

    def auxiliary_probability(self, step: int, steps: int) -> float:
        return co_training_probability(step, steps, self.auxiliary_start, self.auxiliary_decay)

    def parameter_groups(self) -> Iterator[dict[str, Any]]:
        """Weights of layers decay as the optimizer says; multipliers by their own; biases, batch-norm, the classifier
        and the scale not. It is the code's L2 terms, but for being added after gradients are clipped.
        """
        decayed = self._kernels() if self.task_embedding is None else [*self._kernels(), *self.task_embedding.weights()]
        multipliers = [] if self.task_embedding is None else self.task_embedding.multipliers()
        special = {id(p) for p in [*decayed, *multipliers]}
        yield {"params": decayed}
        yield {"params": [p for p in self.parameters() if id(p) not in special], "weight_decay": 0.0}
        if multipliers:
            yield {"params": multipliers, "weight_decay": self.multiplier_decay}

    def penalties(self, weight_decay: float = 5e-4) -> dict[str, Tensor]:
        """The L2 terms that the decay stands for."""
        terms = {"backbone": l2_penalty(self._kernels(), weight_decay)}
        if self.task_embedding is not None:
            terms["task_embedding"] = l2_penalty(self.task_embedding.weights(), weight_decay)
            terms["multipliers"] = l2_penalty(self.task_embedding.multipliers(), self.multiplier_decay)
        return terms

    def _kernels(self) -> list[nn.Parameter]:
        """Weights of the backbone that are neither biases nor batch-norm's."""
        return [p for p in self.backbone.parameters() if p.ndim > 1]

    def _embed(self, state: State, images: Tensor) -> Tensor:
        """[T, N, C, H, W] -> [T, N, D], modulated by the task of each where the state says so."""
        if self.task_embedding is None:
            return embed(self.backbone, images)
        film = film_of(state["gamma"], state["beta"], self.task_embedding.widths, images.shape[1])
        return self.backbone(images.flatten(0, 1), film).unflatten(0, images.shape[:2])
