"""Models of runs: the one that a run stands for, which on features takes images by the network that made them; the one
that teaches another."""

from dataclasses import replace
from typing import Any

from pipeline.data.dataset import read_manifest
from pipeline.data.features import read_network
from pipeline.data.manifest import FEATURES, Manifest
from pipeline.errors import PipelineError
from pipeline.evaluation.model import Model
from pipeline.evaluation.seen import SPLIT
from pipeline.methods.base import Method
from pipeline.model import build_model
from pipeline.training.checkpoint import BACKBONE, Checkpoint, load_checkpoint
from pipeline.training.runs import Run, best_checkpoint


def model_of_run(run: Run) -> Model:
    return model_of(load_checkpoint(best_checkpoint(run.uri)), run.name)


def model_of(checkpoint: Checkpoint, label: str) -> Model:
    known = checkpoint.dataset
    return Model(checkpoint.spec, checkpoint.model, label, known["uri"], fingerprint=known.get("fingerprint"))


def takes_features(spec: dict[str, Any]) -> bool:
    """Whether a model of this description takes features in place of images."""
    return bool(spec["input"].get("scaling") == FEATURES)


def model_for(model: Model, dataset: str) -> Model:
    """The model as it can be measured on ``dataset``: one on features takes images with the network that made them.

    Raises:
        PipelineError: it takes images, and the dataset holds features; or the network of its own features is gone, or
            is not that of those.
    """
    manifest = read_manifest(dataset)
    holds = manifest.encoding == FEATURES
    if holds and not takes_features(model.spec):
        raise PipelineError(f"{model.label} takes images, and {dataset} holds features: give dataset=FOLDER of images")
    if not takes_features(model.spec) or (holds and model.fingerprint in (None, manifest.fingerprint)):
        return model
    spec, weights, own = _whole(model.spec, model.weights or {}, str(model.dataset))
    if model.fingerprint not in (None, own.fingerprint):
        raise PipelineError(
            f"{model.dataset} holds other features than {model.label} was trained on: make those again, with "
            "python -m jobs.embed, or train anew"
        )
    if not holds:
        return Model(spec, weights if model.weights is not None else None, model.label, dataset)
    if any((manifest.network or {})[key] != (own.network or {})[key] for key in ("backbone", "input", "sha256")):
        raise PipelineError(f"{dataset} holds features by another network than those that {model.label} was trained on")
    return model


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


def load_teacher(spec: dict[str, Any], fingerprint: str | None = None, split: str | None = None) -> Method:
    """The model of the checkpoint ``spec["method"]["teacher"]``, in evaluation mode, its weights fixed.

    Args:
        spec: of the model that is taught.
        fingerprint, split: of the dataset, and which of its splits, that it is taught on; None: known to be the
            teacher's.

    Raises:
        PipelineError: it was trained on other images, or sees them otherwise.
    """
    uri = spec["method"]["teacher"]
    checkpoint = load_checkpoint(uri)
    refused = f"method.teacher={uri}: it cannot teach this model, since it was trained "
    if fingerprint not in (None, checkpoint.dataset["fingerprint"]):
        raise PipelineError(f"{refused}on another dataset, {checkpoint.dataset['name']!r}")
    taught = checkpoint.dataset.get(SPLIT, split)  # runs of earlier code have none
    if split not in (None, taught):
        raise PipelineError(f"{refused}on split {taught!r}, not on {split!r}")
    if checkpoint.spec["classes"] != spec["classes"]:
        raise PipelineError(f"{refused}on {checkpoint.spec['classes']} classes, not on {spec['classes']}")
    if checkpoint.spec["input"] != spec["input"]:
        raise PipelineError(f"{refused}on images that are prepared otherwise: give both the same input.scaling")
    teacher = build_model(checkpoint.spec)
    teacher.load_state_dict(checkpoint.model)
    return teacher.eval().requires_grad_(False)
