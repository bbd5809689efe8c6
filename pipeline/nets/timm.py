"""Networks of the library timm, pretrained or not."""

import difflib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.nets.base import Shape
from pipeline.nets.blocks import to_format
from pipeline.nets.wrapped import Options, Wrapped, library


class Timm(Wrapped):
    """An image encoder of timm, without its classifier.

    Args:
        model: its name in timm, with the tag of its weights or without: "resnet50.a1_in1k", "vit_small_patch16_224".
        weights, weights_sha256, trained_on, freeze, batch_norm: see :class:`Wrapped`; ``trained_on`` None: timm's.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        shape: Shape,
        model: str | None = None,
        weights: str | None = "hub",
        weights_sha256: str | None = None,
        trained_on: str | None = None,
        freeze: str | int = "none",
        batch_norm: str = "batch",
        gradient_checkpointing: bool = False,
    ) -> None:
        self.arguments: Options = {"num_classes": 0, "in_chans": shape[0]}
        if _pretrained_cfg(model).fixed_input_size:
            self.arguments["img_size"] = shape[1:]
        self.model = model
        super().__init__(self._create(False), shape, weights, freeze, batch_norm=batch_norm)
        if gradient_checkpointing:
            try:
                self.network.set_grad_checkpointing()  # type: ignore[operator]
            except (AssertionError, AttributeError) as error:  # so timm says that it cannot
                raise PipelineError(
                    f"backbone.gradient_checkpointing: timm does not offer it for {model}; leave it out"
                ) from error

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(to_format(images, True))  # timm's networks allow it; convolutions are faster on CPUs

    def _create(self, pretrained: bool) -> nn.Module:
        return library("timm", "timm").create_model(self.model, pretrained=pretrained, **self.arguments)

    @classmethod
    def recipe(cls, options: Mapping[str, Any]) -> Options:
        known = _pretrained_cfg(options.get("model"))
        return {
            "mean": list(known.mean),
            "std": list(known.std),
            "size": list(known.input_size[1:]),
            "crop": known.crop_pct,
            "interpolation": "bilinear" if known.interpolation == "bilinear" else "bicubic",
        }

    @classmethod
    def trained_on(cls, options: Mapping[str, Any]) -> str:
        return _pretrained_cfg(options.get("model")).tag or "unknown images"

    def library_weights(self) -> dict[str, Tensor]:
        return self._create(True).state_dict()

    def stage_parameters(self) -> list[list[str]]:
        if not hasattr(self.network, "group_matcher"):
            return super().stage_parameters()
        from timm.models import group_parameters

        groups = group_parameters(self.network, self.network.group_matcher(coarse=True))  # type: ignore[operator]
        return [names for _, names in sorted(groups.items())]


def _pretrained_cfg(model: object) -> Any:
    """What timm knows about a model and its weights."""
    if not isinstance(model, str):
        raise PipelineError("backbone.model must be given: the name of a network of timm, as resnet50.a1_in1k")
    timm = library("timm", "timm")
    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=3)
        raise PipelineError(f"backbone.model={model}: timm has no such network; did you mean {', '.join(close)}?")
    try:
        return timm.get_pretrained_cfg(model)
    except (RuntimeError, KeyError) as error:
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{model.partition('.')[0]}.*")]
        raise PipelineError(f"backbone.model={model}: timm has no such weights; it has {', '.join(tags)}") from error
