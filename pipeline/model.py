"""A model from a plain description: what is stored beside the weights of every checkpoint."""

import inspect
from collections.abc import Mapping
from typing import Any

from pipeline.errors import PipelineError
from pipeline.methods.base import Method
from pipeline.nets import Preprocess, build_backbone
from pipeline.nets.by_name import construct, resolve


def build_model(spec: Mapping[str, Any]) -> Method:
    """The method of a description::

        {"method": {"name": "prototypical", **options}, "backbone": {"name": "conv4", **options},
         "input": {"shape": [C, H, W], "scaling": "unit"}, "way": 60, "shot": 1, "classes": 4112}

    ``shape`` is that of stored images; with ``scaling`` "backbone" the input also has the network's ``mean``, ``std``,
    ``size``, ``crop`` and ``interpolation``.

    ``way`` and ``shot`` (of training episodes, at most) and ``classes`` (of the training split) go to the methods that
    take them.
    A method's name is a module of ``pipeline.methods`` or the import path of the user's own ``Method``.

    Raises:
        PipelineError: an unknown name or option, or an impossible value, in one line.
    """
    backbone = build_backbone(_part(spec, "backbone"), network_shape(spec))
    method = dict(_part(spec, "method"))
    cls: type[Method] = resolve("method", method.pop("name", None), "pipeline.methods", Method)
    way = inspect.signature(cls).parameters.get("way")
    if way is not None and way.default is way.empty and spec.get("way") is None:
        raise PipelineError(f"method {cls.__name__} needs way: give train.way one number of classes, and no range")
    given = {"backbone": backbone} | {key: spec[key] for key in ("way", "shot", "classes") if spec.get(key) is not None}
    return construct("method", cls, method, given)


def build_preprocess(spec: Mapping[str, Any]) -> Preprocess:
    """What turns stored uint8 images into the input of :func:`build_model`'s method: the description's "input"."""
    options = {key: value for key, value in _part(spec, "input").items() if key != "shape"}
    return construct("input", Preprocess, options, {})


def _part(spec: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = spec.get(key)
    if not isinstance(part, Mapping):
        raise PipelineError(f"the model's description has no {key!r}")
    return part


def network_shape(spec: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of what the network sees of an image: the stored shape, or that of its own recipe."""
    given = _part(spec, "input")
    own = given.get("scaling") == "backbone"
    try:
        shape = [len(given["mean"]), *given["size"]] if own else given.get("shape")
        channels, height, width = (int(n) for n in shape)  # type: ignore[union-attr]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise PipelineError(f"input.shape must be [channels, height, width], not {given.get('shape')!r}") from None
    return channels, height, width
