"""Proxy-NCA (Movshovitz-Attias, Toshev, Leung, Ioffe & Singh 2017)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.functional.distances import by_class, unit
from pipeline.functional.nca import proxy_distances, proxy_nca
from pipeline.functional.prototypes import prototypes
from pipeline.methods.base import State
from pipeline.methods.head import ClassicalMethod
from pipeline.nets.by_name import choose


class ProxyNCA(ClassicalMethod):
    """Every training class has a proxy p; an image is pulled to its own and pushed from all others.

    The loss of an image x of class y is d(x, p_y) + log sum_{c != y} exp(-d(x, p_c)), d the squared Euclidean distance
    of scaled unit vectors (static assignment, section 4). The proxy of a new class is the direction of the mean of its
    unit embeddings. There are no published figures on few-shot tasks.

    Args:
        classes: number of training classes, at least 2.
        form: "strict": the paper's, without the image's own proxy in the denominator; "softmax": with it, which is a
            cross-entropy, as in the re-implementation.
        smoothing: with "softmax", the share of the target that is spread over the other classes (0.1 in the
            re-implementation: 0.9 for the true class and 0.1 / (C - 1) for every other).
        scale_x, scale_p: lengths of embeddings and proxies (3 and 3 in the re-implementation for CUB and Cars, 1 and 8
            for SOP); a cosine softmax has the scale 2 scale_x scale_p.
        embedding_dim: width of a linear layer after the backbone (64 in the paper); None: the features themselves.
        proxy_lr_scale: learning rate of the proxies, relative to the network's.
    """

    extendable = True

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        form: str = "strict",
        smoothing: float = 0.0,
        scale_x: float = 3.0,
        scale_p: float = 3.0,
        embedding_dim: int | None = None,
        proxy_lr_scale: float = 10.0,
    ) -> None:
        super().__init__(backbone)
        self.with_positive = choose("form", form, ("strict", "softmax")) == "softmax"
        if classes < 2:
            raise PipelineError("proxy_nca needs at least two training classes")
        if not 0 <= smoothing < 1 or (smoothing and not self.with_positive):
            raise PipelineError(f"smoothing={smoothing} must be in [0, 1), and 0 unless form=softmax")
        self.smoothing, self.scale_x, self.scale_p = smoothing, scale_x, scale_p
        self.embedding = nn.Identity() if embedding_dim is None else nn.Linear(self.width, embedding_dim)
        self.proxies = nn.Parameter(torch.randn(classes, embedding_dim or self.width) / 8)
        self.proxy_lr_scale = proxy_lr_scale

    def project(self, features: Tensor) -> Tensor:
        """x, before normalisation."""
        return self.embedding(features)

    def base_scores(self, features: Tensor) -> Tensor:
        return -self._distances(features, self.proxies)

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over images, of minus their distances to the proxies."""
        return proxy_nca(-logits, labels, self.with_positive, self.smoothing).mean()

    def fit(self, features: Tensor, labels: Tensor, way: int) -> State:
        """proxies [T, way, D] of the new classes, of unit length."""
        return {"proxies": unit(prototypes(unit(features), labels, way)[0])}

    def scores(self, state: State, query: Tensor) -> Tensor:
        """Minus the distance to the proxies, class by class, so that a new class changes no other's logit."""
        return -by_class(self._distances, query, state["proxies"])

    def distances(self, logits: Tensor) -> Tensor:
        return -logits

    def parameter_groups(self) -> Iterator[dict[str, Any]]:
        yield {"params": [*self.backbone.parameters(), *self.embedding.parameters()], "lr_scale": 1.0}
        yield {"params": [self.proxies], "lr_scale": self.proxy_lr_scale}

    def _distances(self, x: Tensor, proxies: Tensor) -> Tensor:
        return proxy_distances(x, proxies, self.scale_x, self.scale_p)
