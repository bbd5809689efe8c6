"""Distributed meta-training of few-shot methods on Ray.

This module, ``pipeline.batch``, ``pipeline.nets``, ``pipeline.functional``, ``pipeline.methods`` and
``pipeline.inference`` import neither Ray nor MLflow nor Hydra: a registered model carries them alone.
"""

__version__ = "0.1.0"
