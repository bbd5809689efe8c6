"""The first weights of a network: where they are from, whether they are those that were meant, and that they fit."""

import io
import pickle
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from pipeline import store
from pipeline.data.dataset import read_manifest
from pipeline.data.manifest import FEATURES
from pipeline.errors import PipelineError, some
from pipeline.files import sha256, tensors_to_bytes
from pipeline.nets import build_backbone, own_code
from pipeline.nets.base import Backbone, Shape
from pipeline.nets.by_name import resolve
from pipeline.nets.norm import in_rows
from pipeline.nets.wrapped import Options, Wrapped

HUB = "hub"
NESTED = ("state_dict", "model_state_dict", "model", "teacher")  # under which training scripts keep the weights
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Found:
    """Weights that fit a network."""

    tensors: dict[str, Tensor]  # by the network's names
    sha256: str  # of the file, or of the tensors as safetensors
    left: list[str]  # what the file has beside them


def family(options: Mapping[str, Any]) -> type[Wrapped] | None:
    """The kind of a backbone that can have weights from elsewhere; None: it cannot."""
    name = options.get("name")
    found = resolve("backbone", name, "pipeline.nets", Backbone, nn.Module)
    return found if issubclass(found, Wrapped) else None


def settle(options: Mapping[str, Any]) -> Options:
    """A backbone's options with what it takes from elsewhere written down, its architecture and what it has learnt."""
    kind = family(options)
    if kind is None:
        return dict(options)
    settled = kind.settle(options)
    weights = settled.get("weights", kind.first)
    if weights is not None:
        trained_on = settled.get("trained_on") or (kind.trained_on(options) if weights == HUB else "unknown images")
        settled |= {"weights": weights, "trained_on": trained_on}
    return settled


def recipe(options: Mapping[str, Any], channels: int) -> Options:
    """How images of so many channels are to be prepared for the weights of a backbone, as its makers did.

    Raises:
        PipelineError: the backbone does not say, or takes other images.
    """
    kind = family(options)
    if kind is None:
        raise PipelineError(
            f"input.scaling=backbone: backbone={options.get('name')} has no input of its own; give unit or standard"
        )
    found = kind.recipe(options)
    wanted = len(found["mean"])
    if channels not in (1, wanted):
        raise PipelineError(f"input.scaling=backbone: the network takes {wanted} channels, the images have {channels}")
    return found


def described(options: Mapping[str, Any]) -> Options:
    """Options of which a network is built whose weights are with it already."""
    return dict(options) if family(options) is None else {**options, "weights": None}


def origin(backbone: Mapping[str, Any]) -> str | None:
    """What people who read an accuracy need to know of a backbone's first weights; None: they were drawn."""
    if not backbone.get("weights_sha256"):
        return None
    images = backbone.get("trained_on") or "unknown images"
    return f"weights trained on {images}, whose classes may be among those of the test"


def origin_of(spec: Mapping[str, Any], dataset: str | None) -> str | None:
    """:func:`origin` of a model's backbone; of one on features, of the network that made its ``dataset``."""
    backbone = spec["backbone"]
    if backbone.get("name") == FEATURES and dataset is not None:
        with suppress(PipelineError):  # the features may be gone
            backbone = (read_manifest(dataset).network or {}).get("backbone", backbone)
    return origin(backbone)


def own_sources(spec: Mapping[str, Any]) -> own_code.Sources | None:
    """The user's code that a model's description needs, to be sent to other machines; None: it needs none."""
    backbone = spec["backbone"]
    return own_code.find(backbone["code_sha256"], backbone.get("path")) if backbone.get("code_sha256") else None


def with_weights(options: Mapping[str, Any], shape: Shape) -> nn.Module:
    """The backbone of ``options`` for images of ``shape`` (C, H, W), with its weights, in evaluation mode."""
    backbone = build_backbone(described(options), shape)
    give(backbone, options)
    return backbone.eval()


def give(backbone: nn.Module, options: Mapping[str, Any]) -> Found | None:
    """Put the weights that ``options`` name into a backbone that was built of them; None: it begins as it was drawn."""
    if not isinstance(backbone, Wrapped) or options.get("weights", backbone.first) is None:
        return None
    found = read(backbone, options)
    backbone.network.load_state_dict({**backbone.network.state_dict(), **found.tensors})
    return found


def read(backbone: Wrapped, options: Mapping[str, Any]) -> Found:
    """The weights that ``options`` name, which fit the network.

    Raises:
        PipelineError: they cannot be read, are not those of ``weights_sha256``, or do not fit, in one line.
    """
    source, expected = str(options.get("weights", backbone.first)), options.get("weights_sha256")
    if source == HUB:
        given = _from_hub(backbone, options)
        digest = sha256(tensors_to_bytes({name: given[name] for name in sorted(given)}))
    else:
        content = store.read_bytes(source)
        digest, given = sha256(content), _tensors(content, source)
    if expected is not None and expected != digest:
        raise PipelineError(f"backbone.weights={source} are other weights: SHA-256 {digest}, not {expected}")
    own = backbone.network.state_dict()
    given = in_rows(backbone.network, _unwrapped(given, own))
    left = sorted(given.keys() - own.keys())
    wrong = [
        f"{name} {list(given[name].shape)}, not {list(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    needed = {name for name in own if own[name].is_floating_point()} - backbone.unused  # no counter of batches
    missing = sorted(needed - given.keys())
    if wrong or missing:
        what = [f"of another shape: {some(wrong, SHOWN)}"] if wrong else []
        what += [f"missing: {some(missing, SHOWN)}"] if missing else []
        what += [f"not the network's: {some(left, SHOWN)}"] if left else []
        size = "; images of another size? give input.scaling=backbone" if wrong else ""
        raise PipelineError(f"backbone.weights={source} do not fit the network: {'; '.join(what)}{size}")
    return Found({name: given[name].to(own[name].dtype) for name in own if name in given}, digest, left)


def _from_hub(backbone: Wrapped, options: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        return backbone.library_weights()
    except PipelineError:
        raise
    except Exception as error:  # of every kind: no network, no such file, a library's own
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        model = options.get("model")
        raise PipelineError(
            f"backbone.weights=hub: the weights of {model} cannot be had ({why}); download them elsewhere and give "
            "backbone.weights=FILE"
        ) from error


def _tensors(content: bytes, source: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of one that PyTorch saved and that holds nothing that could run."""
    try:
        if source.endswith((".pth", ".pt", ".bin", ".ckpt")):
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            for key in NESTED:
                if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
                    found = found[key]
            if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
                raise ValueError("it holds more than tensors by name")
            tensors = dict(found)
        else:
            tensors = load(content)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        why = " ".join(str(error).split())[:200]
        raise PipelineError(
            f"backbone.weights={source} is no file of weights ({why}); give safetensors, or .pth or .pt with tensors"
        ) from error
    return tensors


def _unwrapped(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``given`` by the network's ``own`` names, where it was compiled or trained by DistributedDataParallel."""
    found = {name if name in own else name.replace("_orig_mod.", ""): tensor for name, tensor in given.items()}
    if all(name.startswith("module.") for name in found) and not found.keys() & own.keys():
        return {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return found
