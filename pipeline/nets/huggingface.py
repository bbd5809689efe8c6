"""Image encoders of the library transformers, pretrained or not."""

import inspect
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.nets.base import Shape
from pipeline.nets.by_name import choose
from pipeline.nets.wrapped import Options, Wrapped, library

_WARPED = 384  # from this size on, ConvNeXt's images are resized whole, and nothing is cut off
_NOT_BUILT_OF = ("transformers_version", "_name_or_path", "architectures", "id2label", "label2id", "dtype")
_transformers = partial(library, "huggingface", "transformers")


class HuggingFace(Wrapped):
    """An image encoder of transformers: ViT, DINOv2, the image towers of CLIP and SigLIP, ResNet, ConvNeXt, ...

    Args:
        model: its name on the Hugging Face hub, or a folder that the library saved it to.
        pooling: "cls": the class token, or what the network itself makes of its output where it does so (the towers of
            CLIP and SigLIP, ResNet); "mean": the mean over all patches; "both": one after the other.
        weights, weights_sha256, trained_on, freeze, batch_norm: see :class:`Wrapped`; ``trained_on`` None: ``model``.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        architecture: its description in JSON; None: that of ``model``. A run records it, and needs ``model`` no more.
    """

    def __init__(
        self,
        shape: Shape,
        model: str | None = None,
        pooling: str = "cls",
        weights: str | None = "hub",
        weights_sha256: str | None = None,
        trained_on: str | None = None,
        freeze: str | int = "none",
        batch_norm: str = "batch",
        gradient_checkpointing: bool = False,
        architecture: str | None = None,
    ) -> None:
        self.model, self.pooling = model, choose("pooling", pooling, ("cls", "mean", "both"))
        config = _config(architecture if architecture is not None else _architecture(model))
        if getattr(config, "num_channels", shape[0]) != shape[0]:
            raise PipelineError(
                f"backbone.model={model} takes images of {config.num_channels} channels, not {shape[0]}"
            )
        encoder = _transformers().MODEL_MAPPING[type(config)]
        # A pooler is a layer of its own, which few checkpoints have trained: where it can be left out, it is
        self._options = {"add_pooling_layer": False} if _takes(encoder, "add_pooling_layer") else {}
        network = encoder(config, **self._options)
        self._call = {"interpolate_pos_encoding": True} if _takes(network.forward, "interpolate_pos_encoding") else {}
        patch = getattr(config, "patch_size", None)
        self._patches = (shape[1] // patch) * (shape[2] // patch) if isinstance(patch, int) else 0
        super().__init__(network, shape, weights, freeze, batch_norm=batch_norm)
        if gradient_checkpointing:
            network.gradient_checkpointing_enable()

    @classmethod
    def settle(cls, options: Mapping[str, Any]) -> Options:
        architecture = options.get("architecture")
        return {**options, "architecture": architecture or _architecture(options.get("model"))}

    @classmethod
    def recipe(cls, options: Mapping[str, Any]) -> Options:
        processing = library("huggingface", "transformers.image_processing_base")
        model = options.get("model")
        try:
            known = processing.ImageProcessingMixin.get_image_processor_dict(str(model))[0]
        except (OSError, ValueError) as error:
            raise PipelineError(
                f"input.scaling=backbone: backbone.model={model} has no preprocessor_config.json that says how; give "
                "unit or standard"
            ) from error
        normal = known.get("do_normalize", True)
        try:
            resized = _size(known["size"])
            cut = _size(known["crop_size"]) if known.get("do_center_crop") and known.get("crop_size") else resized
            mean = list(known["image_mean"]) if normal else [0.0] * 3
            std = list(known["image_std"]) if normal else [1.0] * 3
        except KeyError as error:
            raise PipelineError(
                f"input.scaling=backbone: the preprocessor_config.json of backbone.model={model} does not say {error}; "
                "give unit or standard"
            ) from error
        crop = min(cut) / min(resized)
        if known.get("crop_pct") and min(resized) < _WARPED:
            crop = known["crop_pct"]  # ConvNeXt's own way to say it
        return {
            "mean": mean,
            "std": std,
            "size": cut,
            "crop": min(1.0, crop),
            "interpolation": "bilinear" if known.get("resample") == 2 else "bicubic",
        }

    @classmethod
    def trained_on(cls, options: Mapping[str, Any]) -> str:
        return f"the images of {options.get('model')}"

    def library_weights(self) -> dict[str, Tensor]:
        encoder, logging = type(self.network), _transformers().logging
        logging.set_verbosity_error()  # what does not fit is said by whoever asked
        logging.disable_progress_bar()
        loaded, found = encoder.from_pretrained(  # type: ignore[attr-defined]
            self.model, config=self.network.config, dtype=torch.float32, output_loading_info=True, **self._options
        )
        left_out = {name for name, *_ in found["mismatched_keys"]} | set(found["missing_keys"])
        return {name: tensor for name, tensor in loaded.state_dict().items() if name not in left_out}

    def forward(self, images: Tensor) -> Tensor:
        found = self.network(images, **self._call)
        last = found.last_hidden_state  # [N, tokens, D] or maps [N, D, H, W]
        maps = last.ndim == 4
        extra = 0 if maps or not self._patches else max(0, last.shape[1] - self._patches)  # class token, registers
        features = []
        if self.pooling != "mean":
            pooled = found.get("pooler_output")
            if pooled is None and not extra:
                kind = type(self.network).__name__
                raise PipelineError(f"backbone.pooling={self.pooling}: {kind} has no class token; use mean")
            features.append(last[:, 0] if pooled is None else pooled.flatten(1))
        if self.pooling != "cls":
            features.append(last.mean((2, 3)) if maps else last[:, extra:].mean(1))
        return torch.cat(features, 1)


def _architecture(model: object) -> str:
    """The description of a model's image encoder, in JSON."""
    if not isinstance(model, str):
        raise PipelineError("backbone.model must be given: a name on the Hugging Face hub, or a folder")
    try:
        config = _transformers().AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise PipelineError(f"backbone.model={model}: no model's folder, and no name on the hub ({why})") from error
    config = getattr(config, "vision_config", config)  # of a model that looks at images and text
    return json.dumps({key: value for key, value in config.to_dict().items() if key not in _NOT_BUILT_OF})


def _config(architecture: str) -> Any:
    try:
        config = _transformers().AutoConfig.for_model(**json.loads(architecture))
    except (ValueError, TypeError) as error:
        raise PipelineError(f"backbone.architecture describes no model ({str(error).splitlines()[0]})") from error
    encoders = _transformers().MODEL_MAPPING
    if type(config) not in encoders or _takes(encoders[type(config)].forward, "input_ids"):
        raise PipelineError(f"backbone.model: transformers has no image encoder of the kind {config.model_type!r}")
    return config


def _takes(function: Any, argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def _size(described: Mapping[str, int] | int) -> list[int]:
    """[H, W] of {"height", "width"} or {"shortest_edge"}."""
    if isinstance(described, int):
        return [described, described]
    if "shortest_edge" in described:
        return [described["shortest_edge"]] * 2
    return [described["height"], described["width"]]
