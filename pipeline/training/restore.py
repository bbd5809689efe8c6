"""Where a worker group goes on: at the newest checkpoint that is whole, the same one on every worker."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline import store
from pipeline.errors import PipelineError
from pipeline.training.checkpoint import STATE, Checkpoint, Damaged, load_checkpoint
from pipeline.training.loop import Workers
from pipeline.training.runs import checkpoints

DAMAGED = "damaged.json"  # the name that the state of a damaged checkpoint gets, which makes it a checkpoint no more


def newest_whole(run_uri: str, newest: str, workers: Workers, say: Callable[[str], None]) -> Checkpoint:
    """The run's newest whole checkpoint, no newer than the one named ``newest``; what is passed over is said.

    A checkpoint that reads damaged is read twice, since it may have been altered on its way. The workers agree on the
    oldest of what each of them found.

    Raises:
        PipelineError: none is whole, or the store fails.
    """
    candidates = [uri for uri in reversed(checkpoints(run_uri)) if name_of(uri) <= newest]
    known = {name_of(uri) for uri in candidates}
    if newest not in known:
        candidates.insert(0, store.join(run_uri, newest))
    found, position, reasons = None, len(candidates), []
    for number, uri in enumerate(candidates):
        try:
            found, position = _read_twice(uri), number
            break
        except Damaged as error:
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
    """The name of the folder for the checkpoint of ``step``: another where a damaged one has it."""
    name, number = f"step_{step:08d}", 1
    while store.exists(store.join(run_uri, name, DAMAGED)):
        number += 1
        name = f"step_{step:08d}.{number}"
    return name


def name_of(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


def _read_twice(uri: str) -> Checkpoint:
    try:
        return load_checkpoint(uri)
    except Damaged:
        return load_checkpoint(uri)


def _set_aside(uri: str) -> None:
    """Nobody shall take it for a checkpoint again; Ray Train, which counts folders, still finds its folder."""
    if store.exists(store.join(uri, STATE)):
        store.rename(store.join(uri, STATE), DAMAGED)
    else:
        store.write_bytes(store.join(uri, DAMAGED), b"{}")
