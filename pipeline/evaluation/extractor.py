"""The backbone of any trained model, by itself: what its features are like, whatever method trained it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.batch import Images
from pipeline.data.batches import read_batch
from pipeline.data.dataset import Dataset
from pipeline.data.episodes import ImagePlan
from pipeline.evaluation.model import Built, Model
from pipeline.model import build_model
from pipeline.nets.pieces import in_pieces

KINDS = {"episodic": "meta", "both": "meta", "classical": "classical"}  # of training, by a method's regime


@torch.no_grad()
def image_features(built: Built, dataset: Dataset, plan: ImagePlan) -> Tensor:
    """Features float32 [B, D] of the images of a plan by the backbone alone, on the CPU."""
    batch = read_batch(dataset, plan, built.device)
    assert isinstance(batch, Images)
    return in_pieces(built.method.extractor(), built.preprocess(batch.images)).float().cpu()


def kind(model: Model) -> str:
    """ "meta" or "classical": how the model was trained."""
    return KINDS[build_model(model.spec).regime]


def matched(models: list[Model]) -> list[tuple[Model, Model]]:
    """Every (meta-trained, classically trained) pair of models with the same backbone and input."""

    def network(model: Model) -> dict[str, Any]:
        return {"backbone": model.spec["backbone"], "shape": model.spec["input"]["shape"]}

    kinds = [(model, kind(model)) for model in models]
    return [
        (meta, classical)
        for meta, one in kinds
        for classical, other in kinds
        if (one, other) == ("meta", "classical") and network(meta) == network(classical)
    ]
