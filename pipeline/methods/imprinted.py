"""Classical training with a normalised classifier, then imprinted weights for new classes (Qi, Brown & Lowe 2018)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.batch import Images
from pipeline.errors import PipelineError
from pipeline.functional.distances import by_class, dot
from pipeline.functional.precision import in_float32
from pipeline.functional.prototypes import prototypes
from pipeline.methods.base import State
from pipeline.methods.head import ClassicalMethod, ClassMeans

EPS = 1e-10  # added to the squared norm of what is normalised


class Imprinted(ClassicalMethod):
    """A cosine classifier over the training classes, whose weights for new classes are their mean embeddings.

    Logits are s w_c.e(x) for unit embeddings e and unit weights w, without bias (equations 1 to 4). A state of
    :meth:`adapt` answers among the new classes only, one of :meth:`joint_state` among training and new classes.

    Args:
        scale: initial s.
        learn_scale: whether s is trained, as in the paper.
        embedding_dim: width of a linear layer after the backbone (256 in the re-implementation with a pre-trained
            ResNet-50, 64 in the paper); None: the backbone's features are the embedding.
        head_lr_scale: learning rate of what is not the backbone, relative to the backbone's. The re-implementation has
            10 because its backbone is pre-trained; 1 where everything is new.
    """

    extendable = True

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        scale: float = 10.0,
        learn_scale: bool = True,
        embedding_dim: int | None = None,
        head_lr_scale: float = 1.0,
    ) -> None:
        super().__init__(backbone)
        self.embedding = nn.Identity() if embedding_dim is None else nn.Linear(self.width, embedding_dim)
        self.weight = nn.Parameter(normalise(torch.randn(classes, embedding_dim or self.width)))
        self.scale = nn.Parameter(torch.tensor(float(scale)), requires_grad=learn_scale)
        self.head_lr_scale = head_lr_scale

    @property
    def classes(self) -> int:
        return self.weight.shape[0]

    def project(self, features: Tensor) -> Tensor:
        """The embedding e, before normalisation."""
        return self.embedding(features)

    def base_scores(self, features: Tensor) -> Tensor:
        return cosine_logits(features, self.weight, self.scale)

    def fit(self, features: Tensor, labels: Tensor, way: int) -> State:
        """weights [T, way, D] of the new classes (section 3.1). Augmented copies of an image are more support."""
        return {"weights": imprint(features, labels, way)}

    def scores(self, state: State, query: Tensor) -> Tensor:
        return cosine_logits(query, state["weights"], self.scale, class_by_class=not self.training)

    def distances(self, logits: Tensor) -> Tensor:
        return 1 - logits / self.scale

    def class_means(self) -> ClassMeans:
        return ClassMeans("dot", self.scale.item(), unit=True, unit_means=True)

    def joint_state(self, support: Tensor, labels: Tensor, way: int | None = None) -> State:
        """As ``adapt``, to answer over the training classes and, after them, the new: [T, classes + way, D]."""
        new = self.adapt(support, labels, way)["weights"]
        return {"weights": torch.cat([self.weight.expand(len(new), -1, -1), new], dim=1)}

    def refresh(self, state: State, support: Tensor, labels: Tensor, rate: float) -> State:
        """Known classes blended with new images of them (adaptive proxies, Siam et al. 2019, equation 2).

        The proxy of a class is what its new images alone would be imprinted as, of unit length like the weight.

        Args:
            support: [T, S, C, H, W] with at least one image of every class that is to move; others stay as they are.
            rate: share of the new images in the weight.
        """
        weights = state["weights"]
        proxies = imprint(self.features(support), labels, weights.shape[1])
        seen = (labels.unsqueeze(-1) == torch.arange(weights.shape[1], device=labels.device)).any(1).unsqueeze(-1)
        return {"weights": blend(weights, proxies, rate).where(seen, weights)}

    def parameter_groups(self) -> Iterator[dict[str, Any]]:
        yield {"params": list(self.backbone.parameters()), "lr_scale": 1.0}
        yield {"params": [*self.embedding.parameters(), self.weight, self.scale], "lr_scale": self.head_lr_scale}

    @torch.no_grad()
    def after_step(self) -> None:
        """Weights go back to unit length."""
        self.weight.copy_(normalise(self.weight))

    def with_classes(self, state: State) -> Imprinted:
        """A copy of the model whose training classes are the classes of a state of one task [1, W, D]: to fine-tune."""
        if len(state["weights"]) != 1:
            raise PipelineError(f"one task is needed to make a classifier, not {len(state['weights'])}")
        joint = copy.deepcopy(self)
        joint.weight = nn.Parameter(state["weights"][0].detach().clone())
        return joint


def fine_tune(
    model: Imprinted,
    batches: Iterable[Images],
    lr: float = 1e-4,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    lr_decay: float = 0.94,
    decay_every: int | None = None,
) -> None:
    """Fine-tune a whole joint classifier in place (section 3.3, "Imprint + FT").

    Args:
        model: from ``with_classes(joint_state(...))``; its mode (train or eval) is the same afterwards.
        batches: class-balanced over training and new classes (:func:`pipeline.evaluation.generalized.class_balanced`),
            labels in 0..classes-1 of ``model``, images preprocessed.
        lr_decay, decay_every: the rate is multiplied by ``lr_decay`` after every ``decay_every`` batches (four epochs
            in the paper); None: it is constant.
    """
    was_training = model.training
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    for step, batch in enumerate(batches, start=1):
        loss, _ = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step()
        if decay_every is not None and step % decay_every == 0:
            optimizer.param_groups[0]["lr"] *= lr_decay
    model.train(was_training)


@in_float32
def normalise(x: Tensor) -> Tensor:
    """x / sqrt(||x||^2 + EPS) over the last dimension."""
    return x / (x.square().sum(-1, keepdim=True) + EPS).sqrt()


@in_float32
def imprint(embeddings: Tensor, labels: Tensor, way: int) -> Tensor:
    """Unit weights [T, way, D] of new classes from embeddings [T, S, D] with labels [T, S] (section 3.1).

    The embeddings are normalised, averaged over each class, and the mean is normalised again.
    """
    means, _ = prototypes(normalise(embeddings), labels, way)
    return normalise(means)


@in_float32
def blend(weights: Tensor, proxies: Tensor, rate: float) -> Tensor:
    """Known classes moved towards what was seen of them lately: normalise((1 - rate) w + rate proxy), [..., W, D].

    Here EPS is added to the norm, as the authors' code does.
    """
    mixed = (1 - rate) * weights + rate * proxies
    return mixed / (mixed.norm(dim=-1, keepdim=True) + EPS)


@in_float32
def cosine_logits(embeddings: Tensor, weights: Tensor, scale: Tensor | float, class_by_class: bool = False) -> Tensor:
    """scale * normalise(e).w for unit weights: [..., N, D] and [..., W, D] give [..., N, W].

    ``class_by_class``: the logits of a class are bitwise the same whatever other classes are there.
    """
    unit = normalise(embeddings)
    return scale * -(by_class(dot, unit, weights) if class_by_class else dot(unit, weights))
