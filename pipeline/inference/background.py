"""The classes of the training split as a background model: what queries of no enrolled class are like."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.methods.base import Method
from pipeline.methods.head import HeadMethod

CLASSES, IMAGES = 100, 20  # training classes, and images of each, at most
_AT_ONCE = 2**20  # pixels


@dataclass(frozen=True, eq=False)
class Background:
    """Mean features of training classes, which a method compares with a query as though they were enrolled."""

    means: Tensor  # float32 [K, ...], one a class, of the features that the method's head sees

    def support(self, means: Tensor) -> tuple[Tensor, Tensor, int]:
        """What a head is fitted to, so that every training class has its mean as its only image."""
        return means[None], torch.arange(len(means), device=means.device)[None], len(means)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Background) and torch.equal(self.means, other.means)

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        numbers = self.means.cpu().numpy().astype("<f4")
        return {"shape": list(numbers.shape), "float32": base64.b64encode(numbers.tobytes()).decode()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Background:
        """Inverse of :meth:`to_dict`; raises ValueError, TypeError or KeyError for anything else."""
        numbers = np.frombuffer(base64.b64decode(content["float32"], validate=True), dtype="<f4")
        means = numbers.reshape([int(n) for n in content["shape"]])
        if means.ndim < 2 or len(means) < 2 or not np.isfinite(means).all():
            raise ValueError(f"a background of shape {list(means.shape)}, or with values that are no numbers")
        return cls(torch.from_numpy(means.astype(np.float32)))


def has_background(method: Method) -> TypeGuard[HeadMethod]:
    """Whether a method compares features with class representatives one by one."""
    return isinstance(method, HeadMethod) and method.extendable and method.fixed_way is None


def survey(
    method: Method,
    preprocess: nn.Module,
    images: Callable[[np.ndarray, np.ndarray], np.ndarray],
    counts: np.ndarray,
    seed: int = 0,
) -> Background | None:
    """Means of up to :data:`IMAGES` images each of up to :data:`CLASSES` classes that are drawn by ``seed``.

    Args:
        method, preprocess: in evaluation mode, on their device.
        images: class and image numbers int64 [N] to uint8 images [N, C, H, W].
        counts: int64 [classes] images of every class.

    Returns:
        None where the method compares no features with class representatives one by one (methods that are adapted to
        their task, or whose classes depend on each other), or where there are fewer than two classes.
    """
    if not has_background(method) or len(counts) < 2:
        return None
    rng = np.random.default_rng([seed, 1])
    device = next(method.parameters(), torch.empty(0)).device
    means = []
    for member in np.sort(rng.permutation(len(counts))[:CLASSES]):
        numbers = np.sort(rng.permutation(counts[member])[:IMAGES])
        pixels = torch.from_numpy(images(np.full(len(numbers), member), numbers)).to(device)
        at_once = max(1, _AT_ONCE // (pixels.shape[-1] * pixels.shape[-2]))
        with torch.no_grad():
            found = [method.features(preprocess(part[None]))[0] for part in pixels.split(at_once)]
        means.append(torch.cat(found).float().mean(0))
    return Background(torch.stack(means).cpu())
