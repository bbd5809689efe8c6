"""Checkpoints: safetensors for tensors, JSON for the rest; nothing that is loaded can run code."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pipeline import store
from pipeline.data.shards import sha256
from pipeline.errors import PipelineError

SCHEMA_VERSION = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


class Damaged(PipelineError):
    """A checkpoint that is not what was written."""


@dataclass
class Checkpoint:
    """A position of a run: what it takes to go on from it, bit for bit, and to know what it is."""

    step: int  # optimizer steps done
    spec: dict[str, Any]  # what ``pipeline.model.build_model`` takes
    config: dict[str, Any]  # the composed configuration of the run
    dataset: dict[str, Any]  # name, fingerprint, uri
    metrics: dict[str, float]  # the latest figures, "val/accuracy" and "val/interval" among them
    history: list[dict[str, float]]  # logged figures, in ascending order of "step"
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)  # the optimizer's groups, less their tensors


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Write the files of a checkpoint to a local folder; the one that names the others' hashes comes last."""
    files = {MODEL: save(_contiguous(checkpoint.model)), OPTIMIZER: save(_contiguous(checkpoint.optimizer))}
    for name, content in files.items():
        store.write_bytes(f"{folder}/{name}", content)
    state = {
        "schema": SCHEMA_VERSION,
        **{
            key: getattr(checkpoint, key)
            for key in ("step", "spec", "config", "dataset", "metrics", "history", "groups")
        },
        "sha256": {name: sha256(content) for name, content in files.items()},
    }
    state["digest"] = _digest(state)
    store.write_bytes(f"{folder}/{STATE}", json.dumps(state, indent=1).encode())


def load_checkpoint(uri: str) -> Checkpoint:
    """Read a checkpoint from a local folder or ``s3://``.

    Raises:
        Damaged: it is not what was written; its name and what is wrong with it.
        PipelineError: it is of another version, or the store fails.
    """
    try:
        state = json.loads(_read(uri, STATE))
        if state["schema"] != SCHEMA_VERSION:
            raise PipelineError(f"checkpoint {uri} has schema {state['schema']}; this code reads {SCHEMA_VERSION}")
        if state.pop("digest", None) not in (None, _digest(state)):  # those of earlier versions have none
            raise Damaged(f"checkpoint {uri} is damaged: {STATE} is not as it was written")
        tensors = {}
        for name in (MODEL, OPTIMIZER):
            content = _read(uri, name)
            if sha256(content) != state["sha256"][name]:
                raise Damaged(f"checkpoint {uri} is damaged: {name} does not have the SHA-256 of {STATE}")
            tensors[name] = load(content)
        keys = ("step", "spec", "config", "dataset", "metrics", "history", "groups")
        values = {key: state[key] for key in keys}
        return Checkpoint(**values, model=tensors[MODEL], optimizer=tensors[OPTIMIZER])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise Damaged(f"{uri} is not a checkpoint ({type(error).__name__}: {error})") from error


def _read(uri: str, name: str) -> bytes:
    where = store.join(uri, name)
    if not store.exists(where):
        raise Damaged(f"checkpoint {uri} is damaged: it has no {name}")
    return store.read_bytes(where)


def _digest(state: dict[str, Any]) -> str:
    """SHA-256 of the state as JSON, whatever the order of its keys."""
    return sha256(json.dumps(state, sort_keys=True).encode())


def flatten_optimizers(
    optimizers: dict[str, torch.optim.Optimizer],
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The state of named optimizers as tensors "name/number/key", and their groups as plain values.

    Where there is one, its name is left out.
    """
    tensors, groups = {}, []
    for name, optimizer in optimizers.items():
        state = optimizer.state_dict()
        prefix = "" if len(optimizers) == 1 else f"{name}/"
        for number, entry in state["state"].items():
            for key, value in entry.items():
                if value is not None:
                    tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                    tensors[f"{prefix}{number}/{key}"] = tensor
        groups += [dict(group) for group in state["param_groups"]]
    return tensors, groups


def restore_optimizers(
    optimizers: dict[str, torch.optim.Optimizer], tensors: dict[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    tupled = [{key: tuple(v) if key == "betas" else v for key, v in group.items()} for group in groups]
    for name, optimizer in optimizers.items():
        prefix = "" if len(optimizers) == 1 else f"{name}/"
        state: dict[int, dict[str, Tensor]] = {}
        for path, value in tensors.items():
            if path.startswith(prefix):
                number, _, key = path.removeprefix(prefix).partition("/")
                state.setdefault(int(number), {})[key] = value
        count = len(optimizer.param_groups)
        optimizer.load_state_dict({"state": state, "param_groups": tupled[:count]})
        tupled = tupled[count:]


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
