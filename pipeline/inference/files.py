"""Safetensors and JSON, read without running anything."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from pipeline.errors import PipelineError


def read_tensors(path: str | Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; ``remedy`` tells what to do when it is none."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise PipelineError(f"{path} does not exist; {remedy}") from error
    except (SafetensorError, OSError) as error:
        raise PipelineError(f"{path} is not a readable safetensors file ({error}); {remedy}") from error


def tensors_of(content: bytes, name: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same from a file's content; ``name`` is the file's, for messages."""
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise PipelineError(f"{name} is not a readable safetensors file ({error}); {remedy}") from error
    length = int.from_bytes(content[:8], "little")  # of the header, whose metadata the library gives of paths alone
    return tensors, json.loads(content[8 : 8 + length]).get("__metadata__") or {}


def read_json(path: str | Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError as error:
        raise PipelineError(f"{path} does not exist; {remedy}") from error
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path} is not readable JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise PipelineError(f"{path} holds a JSON {type(content).__name__}, not an object; {remedy}")
    return content


def model_fingerprint(spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of a model: its specification and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
