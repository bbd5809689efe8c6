"""What a backbone is, and how one is built from a configuration."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from pipeline.errors import PipelineError
from pipeline.nets.by_name import construct, resolve

Shape = tuple[int, int, int]  # C, H, W


class Backbone(nn.Module):
    """Embeds images: forward takes [N, C, H, W] and returns [N, ``out_features``]; ``shape`` is (C, H, W) of them."""

    out_features: int


def build_backbone(spec: Mapping[str, Any], shape: Shape) -> nn.Module:
    """The backbone of ``spec = {"name": ..., **options}`` for images of ``shape`` (C, H, W).

    ``name`` is a module of this package (conv4, mlp, ...) or the import path of any ``torch.nn.Module`` with an integer
    ``out_features``; such a class is called with its options, and with ``shape`` if its constructor takes it.
    Weights from elsewhere are not read here: ``pipeline.weights.with_weights`` builds a network and gives it its own.

    Raises:
        PipelineError: unknown name or option, a module without ``out_features``, or weights that would not be read.
    """
    options = {k: v for k, v in spec.items() if k != "name"}
    cls = resolve("backbone", spec.get("name"), "pipeline.nets", Backbone, nn.Module)
    backbone = construct("backbone", cls, options, {"shape": shape})
    if not isinstance(getattr(backbone, "out_features", None), int):
        raise PipelineError(f"backbone {cls.__name__} has no integer out_features: set it in its constructor")
    if getattr(backbone, "weights", None) is not None:
        raise PipelineError(f"backbone.weights={backbone.weights}: pipeline.weights.with_weights reads them")
    return backbone
