"""Classifiers of new classes trained by gradient descent on frozen features, all tasks at once (Chen et al. 2019).

Every step adds multiples of support images to the weights, and weight decay shrinks them: a class's weight is always
a w_0 + sum_i A_i x_i. So the descent runs over a and A and looks at inner products alone, which costs S where the
features cost D, and is the same descent.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.functional.losses import PADDING
from pipeline.functional.precision import in_float32
from pipeline.functional.sequences import reordered

EPS = 1e-5  # added to the norm of a feature vector, as the authors' code
SEED = 0
Gradient = Callable[[list[Tensor], Tensor, Tensor, Tensor], list[Tensor]]


@dataclass(frozen=True)
class Descent:
    """Stochastic gradient descent over a support set; the defaults are the paper's recipe."""

    epochs: int = 100
    batch_size: int = 4
    lr: float = 0.01
    momentum: float = 0.9
    dampening: float = 0.9  # of every step but the first, as PyTorch
    weight_decay: float = 0.001


def epoch_orders(labels: Tensor, epochs: int) -> Tensor:
    """Random orders of the support images [epochs, T, S], labels [T, S]; -1 where an epoch has no more images.

    A task's orders depend on its number of images alone, not on the other tasks; padding is left out.
    """
    present = (labels != PADDING).cpu()
    places = (~present).byte().argsort(dim=1, stable=True)  # of every task: what is labelled, then the padding
    orders, counts = torch.full((epochs, *labels.shape), -1), present.sum(1)
    for count in counts.unique().tolist():
        generator = torch.Generator().manual_seed(SEED)
        drawn = torch.rand(epochs, 1, count, generator=generator, dtype=torch.float64).argsort(dim=-1)
        mine = counts == count
        orders[:, mine, :count] = places[mine].expand(epochs, -1, -1).gather(2, drawn.expand(-1, int(mine.sum()), -1))
    return orders.to(labels.device)


def initial_weights(way: int, features: int) -> tuple[Tensor, Tensor]:
    """Weight [way, D] and bias [way] of a new linear layer, uniform within 1/sqrt(D) as PyTorch's, always the same."""
    bound, generator = 1 / math.sqrt(features), torch.Generator().manual_seed(SEED)
    weight, bias = torch.empty(way, features), torch.empty(way)
    return weight.uniform_(-bound, bound, generator=generator), bias.uniform_(-bound, bound, generator=generator)


@in_float32
def fine_tune_linear(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, orders: Tensor, descent: Descent
) -> tuple[Tensor, Tensor]:
    """The linear classifier of every task after minimising the mean cross-entropy of minibatches ("Baseline").

    Args:
        features: [T, S, D], with labels int64 [T, S].
        weight, bias: [T, way, D] and [T, way], to start from.
        orders: of every epoch, [epochs, T, S] (:func:`epoch_orders`); ``descent.epochs`` is not looked at.

    Returns:
        weight and bias.
    """
    space = _Span(features, weight)

    def gradient(parameters: list[Tensor], index: Tensor, target: Tensor, share: Tensor) -> list[Tensor]:
        start, of_images, bias = parameters
        scores = space.products(index, start, of_images) + bias.unsqueeze(-2)
        error = (scores.softmax(-1) - target) * share
        return [torch.zeros_like(start), space.combination(error, index), error.sum(-2)]

    start, of_images, found = _descend(gradient, [*space.parameters(), bias.double()], labels, orders, descent)
    return space.weight(start, of_images), found.to(features.dtype)


@in_float32
def fine_tune_cosine(
    features: Tensor, labels: Tensor, direction: Tensor, length: Tensor, scale: float, orders: Tensor, descent: Descent
) -> tuple[Tensor, Tensor]:
    """As :func:`fine_tune_linear` with the scores of :func:`cosine_scores` ("Baseline++").

    Args:
        direction, length: v [T, way, D] and g [T, way, 1].

    Returns:
        direction and length.
    """
    space = _Span(_unit(features), direction)

    def gradient(parameters: list[Tensor], index: Tensor, target: Tensor, share: Tensor) -> list[Tensor]:
        start, of_images, length = parameters  # s = scale g x.v / |v|
        norm, products = space.norm(start, of_images), space.products(index, start, of_images)
        cosines = products / norm.mT
        error = scale * ((scale * length.mT * cosines).softmax(-1) - target) * share
        along = (error * cosines).sum(-2).unsqueeze(-1)  # [T, way, 1]: the derivative by g
        turned = space.combination(error, index) - along / norm * of_images
        return [-length / norm * along / norm * start, length / norm * turned, along]

    start, of_images, found = _descend(gradient, [*space.parameters(), length.double()], labels, orders, descent)
    return space.weight(start, of_images), found.to(features.dtype)


@in_float32
def cosine_scores(x: Tensor, direction: Tensor, length: Tensor, scale: float) -> Tensor:
    """scale g_c cos(v_c, x): [..., N, D], [..., W, D] and [..., W, 1] give [..., N, W].

    The code of Baseline++ normalises weights by weight normalisation, so that their lengths g are learnt too.
    """
    weight = length * direction / direction.norm(dim=-1, keepdim=True)
    return scale * _unit(x) @ weight.mT


def cosine_scale(classes: int) -> float:
    """The scale of Baseline++'s scores in its authors' code: 2 for at most 200 classes, otherwise 10."""
    return 2.0 if classes <= 200 else 10.0


def _unit(x: Tensor) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) + EPS)


class _Span:
    """Weights a_c w_c + sum_i A_ci x_i by their coefficients a [T, way, 1] and A [T, way, S], in float64.

    Args:
        features: x, [T, S, D].
        weights: w, [T, way, D].
    """

    def __init__(self, features: Tensor, weights: Tensor) -> None:
        self._features, self._weights = features, weights
        wide = features.double(), weights.double()
        self._gram, self._cross = wide[0] @ wide[0].mT, wide[0] @ wide[1].mT  # [T, S, S] and [T, S, way]
        self._squares = wide[1].square().sum(-1, keepdim=True)

    def parameters(self) -> tuple[Tensor, Tensor]:
        """The coefficients of w itself."""
        return torch.ones_like(self._squares), torch.zeros_like(self._cross.mT)

    def products(self, index: Tensor, start: Tensor, of_images: Tensor) -> Tensor:
        """x.w of the images ``index`` [T, B]: [T, B, way]."""
        gram, cross = reordered(self._gram, index), reordered(self._cross, index)
        return cross * start.mT + gram @ of_images.mT

    def combination(self, shares: Tensor, index: Tensor) -> Tensor:
        """The coefficients A of sum_b shares_b x_b over images ``index``: [T, B, way] and [T, B] give [T, way, S]."""
        return shares.mT @ F.one_hot(index, self._gram.shape[-1]).to(shares.dtype)

    def norm(self, start: Tensor, of_images: Tensor) -> Tensor:
        """Lengths [T, way, 1]."""
        squares = start.square() * self._squares + 2 * start * (of_images * self._cross.mT).sum(-1, keepdim=True)
        return (squares + (of_images * (of_images @ self._gram)).sum(-1, keepdim=True)).sqrt()

    def weight(self, start: Tensor, of_images: Tensor) -> Tensor:
        """[T, way, D]."""
        dtype = self._features.dtype
        return start.to(dtype) * self._weights.to(dtype) + of_images.to(dtype) @ self._features


def _descend(
    gradient: Gradient, parameters: list[Tensor], labels: Tensor, orders: Tensor, how: Descent
) -> list[Tensor]:
    """Parameters [T, ...] after stochastic gradient descent; a minibatch without images of a task is no step for it."""
    targets = F.one_hot(labels.clamp(min=0), parameters[0].shape[1]).double()
    buffers: list[Tensor] | None = None
    uneven = bool((orders < 0).any())
    for order in orders:
        for index in order.split(how.batch_size, dim=-1):
            present, index = (index >= 0).unsqueeze(-1), index.clamp(min=0)
            count = present.sum(1, keepdim=True)
            found = gradient(parameters, index, reordered(targets, index), present.double() / count.clamp(min=1))
            found = [g + how.weight_decay * p for g, p in zip(found, parameters, strict=True)]
            if buffers is not None:
                found = [how.momentum * b + (1 - how.dampening) * g for b, g in zip(buffers, found, strict=True)]
            stepped = [p - how.lr * b for p, b in zip(parameters, found, strict=True)]
            if uneven and buffers is not None:
                taken = [(count > 0).view(-1, *[1] * (p.ndim - 1)) for p in parameters]
                found = [f.where(t, b) for f, t, b in zip(found, taken, buffers, strict=True)]
                stepped = [s.where(t, p) for s, t, p in zip(stepped, taken, parameters, strict=True)]
            parameters, buffers = stepped, found
    return parameters
