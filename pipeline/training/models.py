"""The model that a run stands for; of a run on features, with the network that made them, which lets it take images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.data.dataset import read_manifest
from pipeline.data.features import read_network
from pipeline.data.manifest import FEATURES, Manifest
from pipeline.errors import PipelineError
from pipeline.evaluation.model import Model
from pipeline.training.checkpoint import BACKBONE, Checkpoint, load_checkpoint
from pipeline.training.runs import Run, best_checkpoint


def model_of_run(run: Run) -> Model:
    checkpoint = load_checkpoint(best_checkpoint(run.uri))
    return Model(checkpoint.spec, checkpoint.model, run.name, checkpoint.dataset["uri"])


def takes_features(spec: dict[str, Any]) -> bool:
    """Whether a model of this description takes features in place of images."""
    return bool(spec["input"].get("scaling") == FEATURES)


def model_for(model: Model, dataset: str) -> Model:
    """The model as it can be measured on ``dataset``: one on features takes images with the network that made them.

    Raises:
        PipelineError: it takes images, and the dataset holds features; or their network is gone.
    """
    holds = read_manifest(dataset).encoding == FEATURES
    if holds and not takes_features(model.spec):
        raise PipelineError(f"{model.label} takes images, and {dataset} holds features: give dataset=FOLDER of images")
    if holds or not takes_features(model.spec):
        return model
    spec, weights, _ = _whole(model.spec, model.weights or {}, str(model.dataset))
    return Model(spec, weights if model.weights is not None else None, model.label, dataset)


def whole_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose model takes images: itself, or that of a run on features with their network in it.

    The dataset is then that of the images.
    """
    if not takes_features(checkpoint.spec):
        return checkpoint
    spec, weights, manifest = _whole(checkpoint.spec, checkpoint.model, checkpoint.dataset["uri"])
    if manifest.fingerprint != checkpoint.dataset["fingerprint"]:
        raise PipelineError(f"{checkpoint.dataset['uri']} holds other features than the run was trained on")
    images = {**checkpoint.dataset, **(manifest.network or {})["dataset"], "uri": manifest.source.get("dataset")}
    return replace(checkpoint, spec=spec, model=weights, dataset=images)


def _whole(spec: dict[str, Any], weights: dict[str, Any], uri: str) -> tuple[dict[str, Any], dict[str, Any], Manifest]:
    manifest = read_manifest(uri)
    network = read_network(uri, manifest)
    whole = {**spec, "backbone": network.backbone, "input": network.input}
    return whole, {**weights, **{BACKBONE + name: tensor for name, tensor in network.weights.items()}}, manifest
