"""A small model with its own weights, and classes of images that it can tell apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.inference import FewShotClassifier
from pipeline.model import build_model

SHAPE = (1, 20, 20)


def spec_of(method: str = "prototypical", way: int = 5, **options) -> dict:
    return {
        "method": {"name": method, **options},
        "backbone": {"name": "conv4", "width": 16},
        "input": {"shape": list(SHAPE), "scaling": "unit"},
        "way": way,
        "classes": 7,
    }


def draw_pictures() -> np.ndarray:
    rng = np.random.default_rng(0)
    patterns = np.kron(rng.integers(0, 2, (40, 1, 1, 5, 5)) * 160, np.ones((4, 4)))
    return np.clip(patterns + rng.normal(40, 35, (40, 12, *SHAPE)), 0, 255).astype(np.uint8)


def classifier_of(spec: dict, seed: int = 0) -> FewShotClassifier:
    """Random weights, and batch-norm statistics of the pictures, so that embeddings are of the order of one."""
    torch.manual_seed(seed)
    method = build_model(spec).train()
    images = torch.from_numpy(draw_pictures()).float().flatten(0, 1) / 255
    with torch.no_grad():
        for _ in range(30):
            method.backbone(images)
    return FewShotClassifier.from_weights(spec, method.state_dict())


@pytest.fixture(scope="session")
def classifier() -> FewShotClassifier:
    return classifier_of(spec_of())


@pytest.fixture(scope="session")
def pictures() -> np.ndarray:
    """uint8 [40 classes, 12 images, 1, 20, 20]: a coarse random pattern a class, with noise."""
    return draw_pictures()
