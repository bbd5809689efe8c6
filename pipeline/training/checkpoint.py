"""Checkpoints: safetensors for tensors, JSON for the rest; nothing that is loaded can run code.

A group of workers goes on at the newest checkpoint that is whole, the same one on every worker.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from pipeline import store
from pipeline.errors import PipelineError
from pipeline.files import sha256, tensors_to_bytes
from pipeline.nets.norm import in_rows
from pipeline.training.runs import STATE, checkpoints
from pipeline.training.workers import Workers

SCHEMA_VERSION = 1
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
_PLAIN = ("step", "spec", "config", "dataset", "metrics", "history", "groups")  # what STATE has of a checkpoint
SET_ASIDE = "damaged.json"  # the name that the state of a corrupt checkpoint gets, which makes it a checkpoint no more
BACKBONE = "backbone."
COUNTERS = ("steps_taken", "forwards")  # buffers that tell how far a training has come, by the last part of their names


class Corrupt(PipelineError):
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
    files = {MODEL: tensors_to_bytes(checkpoint.model), OPTIMIZER: tensors_to_bytes(checkpoint.optimizer)}
    for name, content in files.items():
        store.write_bytes(f"{folder}/{name}", content)
    state = {
        "schema": SCHEMA_VERSION,
        **{key: getattr(checkpoint, key) for key in _PLAIN},
        "sha256": {name: sha256(content) for name, content in files.items()},
    }
    state["digest"] = _digest(state)
    store.write_bytes(f"{folder}/{STATE}", json.dumps(state, indent=1).encode())


def load_checkpoint(uri: str) -> Checkpoint:
    """Read a checkpoint from a local folder or ``s3://``.

    Raises:
        Corrupt: it is not what was written; its name and what is wrong with it.
        PipelineError: it is of another version, or the store fails.
    """
    try:
        state = json.loads(_read(uri, STATE))
        if state["schema"] != SCHEMA_VERSION:
            raise PipelineError(f"checkpoint {uri} has schema {state['schema']}; this code reads {SCHEMA_VERSION}")
        if state.pop("digest", None) not in (None, _digest(state)):  # those of earlier versions have none
            raise Corrupt(f"checkpoint {uri} is corrupt: {STATE} is not as it was written")
        tensors = {}
        for name in (MODEL, OPTIMIZER):
            content = _read(uri, name)
            if sha256(content) != state["sha256"][name]:
                raise Corrupt(f"checkpoint {uri} is corrupt: {name} does not have the SHA-256 of {STATE}")
            tensors[name] = load(content)
        return Checkpoint(**{key: state[key] for key in _PLAIN}, model=tensors[MODEL], optimizer=tensors[OPTIMIZER])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise Corrupt(f"{uri} is not a checkpoint ({type(error).__name__}: {error})") from error


def _read(uri: str, name: str) -> bytes:
    where = store.join(uri, name)
    if not store.exists(where):
        raise Corrupt(f"checkpoint {uri} is corrupt: it has no {name}")
    return store.read_bytes(where)


def _digest(state: dict[str, Any]) -> str:
    """SHA-256 of the state as JSON, whatever the order of its keys."""
    return sha256(json.dumps(state, sort_keys=True).encode())


def flatten_optimizers(optimizers: dict[str, torch.optim.Optimizer]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
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


def newest_whole(run_uri: str, newest: str, workers: Workers, say: Callable[[str], None]) -> Checkpoint:
    """The run's newest whole checkpoint, no newer than the one named ``newest``; what is passed over is said.

    A checkpoint that reads corrupt is read twice, since it may have been altered on its way. The workers agree on the
    oldest of what each of them found.

    Raises:
        PipelineError: none is whole, or the store fails.
    """
    candidates = [uri for uri in reversed(checkpoints(run_uri)) if name_of(uri) <= newest]
    if newest not in map(name_of, candidates):
        candidates.insert(0, store.join(run_uri, newest))
    found, position, reasons = None, len(candidates), []
    for number, uri in enumerate(candidates):
        try:
            found, position = _read_twice(uri), number
            break
        except Corrupt as error:
            reasons.append(str(error))
    agreed = int(workers.gather(np.asarray([position], dtype=np.float64)).max())
    if agreed == len(candidates):
        raise PipelineError(f"{reasons[-1]}; no other checkpoint of the run is whole: begin a new run")
    if agreed != position or found is None:
        found = _read_twice(candidates[agreed])
    if agreed > 0 and workers.rank == 0:
        for reason in reasons:
            say(f"{reason}; the run goes on from step {found.step}, before it")
        for uri in candidates[:agreed]:
            _set_aside(uri)
    return found


def free_name(run_uri: str, step: int) -> str:
    """The name of the folder for the checkpoint of ``step``: another where a corrupt one has it."""
    name, number = f"step_{step:08d}", 1
    while store.exists(store.join(run_uri, name, SET_ASIDE)):
        number += 1
        name = f"step_{step:08d}.{number}"
    return name


def name_of(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


def _read_twice(uri: str) -> Checkpoint:
    try:
        return load_checkpoint(uri)
    except Corrupt:
        return load_checkpoint(uri)


def _set_aside(uri: str) -> None:
    """Nobody shall take it for a checkpoint again; Ray Train, which counts folders, still finds its folder."""
    if store.exists(store.join(uri, STATE)):
        store.rename(store.join(uri, STATE), SET_ASIDE)
    else:
        store.write_bytes(store.join(uri, SET_ASIDE), b"{}")


def begin_with(method: nn.Module, uri: str) -> list[str]:
    """Give a method the weights of the checkpoint at ``uri``; the names of those that stay as the seed made them.

    Everything of the backbone must fit. Beyond it (a layer with an output a training class, say) what has another name
    or shape stays, and so does what is not trained, which the configuration gives (a metric scale), and counters, which
    begin anew.

    Raises:
        PipelineError: the backbone is another one, or there is no checkpoint.
    """
    given, own = in_rows(method, load_checkpoint(uri).model), method.state_dict()
    fixed = {n for n, p in method.named_parameters() if not p.requires_grad and not n.startswith(BACKBONE)}
    fitting = {n: t for n, t in given.items() if n in own and own[n].shape == t.shape and n not in fixed}
    left = [name for name in own if name not in fitting]
    wrong = [name for name in left if name.startswith(BACKBONE)]
    if wrong or not fitting:
        what = f"{wrong[0]!r} is missing or of another shape" if wrong else "no weight fits"
        raise PipelineError(f"initial={uri}: these are weights of another model ({what}); train from scratch")
    method.load_state_dict({**own, **{n: t for n, t in fitting.items() if n.rpartition(".")[2] not in COUNTERS}})
    return left
