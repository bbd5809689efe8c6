"""The backbone of any trained model, by itself: what its features are like, whatever method trained it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.batch import Images
from pipeline.data.batches import to_batch
from pipeline.data.dataset import Dataset
from pipeline.data.episodes import ImagePlan
from pipeline.evaluation.model import Model, build_on_worker
from pipeline.model import build_model
from pipeline.nets.pieces import in_pieces
from pipeline.nets.preprocess import Preprocess

KINDS = {"episodic": "meta", "both": "meta", "classical": "classical"}  # of training, by a method's regime


@dataclass(frozen=True)
class Extractor:
    """A backbone in evaluation mode with the preprocessing it was trained with, on a device."""

    backbone: nn.Module
    preprocess: Preprocess
    device: torch.device

    @torch.no_grad()
    def features(self, dataset: Dataset, plan: ImagePlan) -> Tensor:
        """Features float32 [B, D] of the images of a plan, on the CPU."""
        pixels = torch.from_numpy(dataset.gather(plan.rows)).to(self.device)
        batch = to_batch(plan, pixels, dataset.manifest.rotations)
        assert isinstance(batch, Images)
        found = in_pieces(self.backbone, self.preprocess(batch.images))
        return found.float().cpu()


def load_extractor(model: Model, gpu: bool = False) -> Extractor:
    method, preprocess, device = build_on_worker(model, gpu)
    return Extractor(method.extractor(), preprocess, device)


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
