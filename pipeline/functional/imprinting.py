"""Imprinted weights (Qi, Brown & Lowe 2018) and their adaptive blending (Siam, Oreshkin & Jagersand 2019)."""

from __future__ import annotations

from torch import Tensor

from pipeline.functional.distances import by_class, dot
from pipeline.functional.precision import in_float32
from pipeline.functional.prototypes import prototypes


@in_float32
def normalise(x: Tensor, eps: float = 1e-10) -> Tensor:
    """x / sqrt(||x||^2 + eps) over the last dimension."""
    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()


@in_float32
def imprint(embeddings: Tensor, labels: Tensor, way: int, eps: float = 1e-10) -> Tensor:
    """Unit weights [T, way, D] of new classes from embeddings [T, S, D] with labels [T, S] (section 3.1).

    The embeddings are normalised, averaged over each class, and the mean is normalised again.
    """
    means, _ = prototypes(normalise(embeddings, eps), labels, way)
    return normalise(means, eps)


@in_float32
def blend(weights: Tensor, proxies: Tensor, rate: float, eps: float = 1e-10) -> Tensor:
    """Known classes moved towards what was seen of them lately: normalise((1 - rate) w + rate proxy), [..., W, D].

    Here eps is added to the norm, as the authors' code does.
    """
    mixed = (1 - rate) * weights + rate * proxies
    return mixed / (mixed.norm(dim=-1, keepdim=True) + eps)


@in_float32
def cosine_logits(
    embeddings: Tensor, weights: Tensor, scale: Tensor | float, eps: float = 1e-10, class_by_class: bool = False
) -> Tensor:
    """scale * normalise(e).w for unit weights: [..., N, D] and [..., W, D] give [..., N, W].

    ``class_by_class``: the logits of a class are bitwise the same whatever other classes are there.
    """
    unit = normalise(embeddings, eps)
    return scale * -(by_class(dot, unit, weights) if class_by_class else dot(unit, weights))
