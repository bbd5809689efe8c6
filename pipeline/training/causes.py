"""What a failed training says: one line where the input is wrong or a machine too small, and what to do about it."""

from __future__ import annotations

import re

from pipeline import store
from pipeline.errors import PipelineError
from pipeline.training.runs import Run

TOO_SMALL = {  # what the error's text has -> what is said
    r"OutOfDisk|No space left on device": store.disk_full("a node"),
    r"CUDA out of memory|OutOfMemoryError: CUDA": "a GPU has too little memory: lower train.tasks (or "
    "train.batch_size) or validation.tasks, give precision=bfloat16, or share a step by more workers (cluster.workers)",
    r"ObjectStoreFullError": "Ray's object store is full: raise cluster.object_store_mb, or on a cluster of your own "
    "the nodes' --object-store-memory",
    r"OutOfMemory|[Oo]ut of memory|MemoryError|an't allocate memory|annot allocate memory|low on memory": "a worker "
    "was out of memory: lower train.tasks (or train.batch_size) or validation.tasks, or take nodes with more memory "
    "(cluster.cpus_per_worker decides how many workers share one)",
}


def cause_of(error: Exception, run: Run) -> Exception:
    """The error to raise for one of Ray Train: one line where it is known, else the error as it is."""
    text = str(error)
    found = re.findall(r"(?:PipelineError|Damaged): (.+)", text)
    if found:
        return PipelineError(f"run {run.name}: {found[-1]}")
    if beginning := re.search(r"TrainController\.__init__(?s:.)*OSError: (.+)", text):
        line = f"its storage does not answer as it should: {beginning[1]}"
        return PipelineError(f"run {run.name}: {line}; go on with it once it does: resume={run.name}")
    for signs, line in TOO_SMALL.items():
        if re.search(signs, text):
            return PipelineError(f"run {run.name}: {line}; then go on with it: resume={run.name}")
    return error
