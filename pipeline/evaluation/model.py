"""What is evaluated: weights, and what builds the method around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.data.seeds import seed_everything
from pipeline.errors import PipelineError
from pipeline.methods.base import Method
from pipeline.model import build_model, build_preprocess
from pipeline.nets.own_code import send
from pipeline.nets.preprocess import Preprocess
from pipeline.weights import own_sources

KINDS = {"episodic": "meta", "both": "meta", "classical": "classical"}  # of training, by a method's regime


@dataclass(frozen=True)
class Model:
    """Weights and what builds the method around them."""

    spec: dict[str, Any]
    weights: dict[str, Tensor] | None  # None: untrained, as the seed makes it
    label: str = "model"
    dataset: str | None = None  # folder or URI of what it was trained on
    code: Mapping[str, str] | None = None  # the user's own, which goes where the model goes
    fingerprint: str | None = None  # of what it was trained on; None: not known

    def __post_init__(self) -> None:
        object.__setattr__(self, "code", self.code or own_sources(self.spec))

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of its images."""
        channels, height, width = self.spec["input"]["shape"]
        return channels, height, width

    def untrained(self, seed: int = 0) -> Model:
        """The same with the weights that a run of this ``seed`` draws.

        Raises:
            PipelineError: it began with weights from elsewhere, which are not with it any more.
        """
        if self.spec["backbone"].get("weights_sha256"):
            raise PipelineError(
                f"untrained: {self.label} began with weights from elsewhere; measure them with a run of steps=0"
            )
        first, _ = Model(self.spec, None, code=self.code).build(seed=seed)
        return replace(self, weights=dict(first.state_dict()), label="untrained")

    def build(self, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Method, Preprocess]:
        """The method in evaluation mode, and what prepares its images; ``seed`` is of untrained weights."""
        send(self.code)
        if self.weights is None:
            seed_everything("weights", seed)  # as a run does
        else:
            torch.manual_seed(seed)
        method = build_model(self.spec)
        if self.weights is not None:
            method.load_state_dict(self.weights)
        return method.to(device).eval(), build_preprocess(self.spec).to(device)


def kind(model: Model) -> str:
    """ "meta" or "classical": how the model was trained."""
    return KINDS[build_model(model.spec).regime]


def matched(models: list[Model]) -> list[tuple[Model, Model]]:
    """Every (meta-trained, classically trained) pair of models with the same backbone and input."""

    def network(model: Model) -> tuple[Any, Any]:
        return model.spec["backbone"], model.spec["input"]["shape"]

    kinds = [(model, kind(model)) for model in models]
    return [
        (meta, classical)
        for meta, one in kinds
        for classical, other in kinds
        if (one, other) == ("meta", "classical") and network(meta) == network(classical)
    ]


class Built(NamedTuple):
    """A model as it answers: its method in evaluation mode, what prepares its images, and where both are."""

    method: Method
    preprocess: Preprocess
    device: torch.device


def build_on_worker(model: Model, gpu: bool = False) -> Built:
    """The same in a process of the cluster, which has one core and perhaps a GPU."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if gpu else "cpu")
    return Built(*model.build(device), device)
