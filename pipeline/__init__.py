"""Distributed meta-training of few-shot methods on Ray.

In Python::

    from pipeline import evaluate, ingest, load, train, tune

These five come from ``pipeline.api`` when they are asked for: importing ``pipeline`` alone imports nothing else.
This module, ``pipeline.batch``, ``pipeline.nets``, ``pipeline.functional``, ``pipeline.methods`` and
``pipeline.inference`` import neither Ray nor MLflow nor Hydra: a registered model carries them alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import evaluate, ingest, load, train, tune

__version__ = "0.1.0"
__all__ = ["evaluate", "ingest", "load", "train", "tune"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from pipeline import api  # imports Hydra, PyTorch and, when a function is called, Ray and MLflow

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
