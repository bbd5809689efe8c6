"""A machine that is too small is said in one line that names the knob, from the real text of the error."""

from __future__ import annotations

import errno
import os
import traceback

import pytest
import ray
import torch

from pipeline.errors import PipelineError, Unavailable
from pipeline.training.diagnosis import cause_of
from pipeline.training.runs import Run

RUN = Run("small", "/runs/small", {}, {}, {})


def allocate() -> None:
    torch.empty(2**50)


def disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/checkpoint")


def store() -> None:
    raise ray.exceptions.ObjectStoreFullError("Failed to put object 00ff in object store because it is full.")


def spilled() -> None:
    raise ray.exceptions.OutOfDiskError("Local disk is full")


def monitor() -> None:
    raise ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.")


def mistake() -> None:
    raise PipelineError("shard x is damaged")


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        (allocate, "lower train.meta_batch_size"),
        (monitor, "lower train.meta_batch_size"),
        (disk, "TMPDIR"),
        (spilled, "TMPDIR"),
        (store, "cluster.object_store_mb"),
        (mistake, "run small: shard x is damaged"),
    ],
)
def test_one_line_that_names_the_knob(fails, says):
    with pytest.raises(Exception) as error:  # noqa: B017, PT011
        fails()
    text = "".join(traceback.format_exception(error.value))
    found = cause_of(RuntimeError(f"Training failed due to worker errors:\n[Rank 0]\n{text}"), RUN)
    assert isinstance(found, PipelineError) and says in str(found) and "\n" not in str(found)


@pytest.mark.parametrize("fails", [disk, spilled])
def test_a_full_disk_may_have_room_later(fails):
    with pytest.raises(Exception) as error:  # noqa: B017, PT011
        fails()
    text = "".join(traceback.format_exception(error.value))
    assert type(cause_of(RuntimeError(text), RUN)) is Unavailable


def test_lost_workers_are_one_line_and_may_work_later():
    for error in (
        ray.exceptions.ActorDiedError(),
        ray.exceptions.NodeDiedError("the node was terminated"),
        ray.exceptions.WorkerCrashedError(),
    ):
        text = "".join(traceback.format_exception(error))
        found = cause_of(RuntimeError(f"Training failed due to worker errors:\n[Rank 0]\n{text}"), RUN)
        assert type(found) is Unavailable
        assert str(found).endswith("go on with it: python -m jobs.train resume=/runs/small")


@pytest.mark.parametrize("kind", [PipelineError, Unavailable])
def test_what_may_work_later_stays_apart_from_a_mistake(kind):
    text = "".join(traceback.format_exception(kind("s3://b: the object store fails for 120 s now: SLOW_DOWN")))
    found = cause_of(RuntimeError(f"Training failed due to worker errors:\n[Rank 0]\n{text}"), RUN)
    assert type(found) is kind and str(found).startswith("run small: s3://b: the object store fails")


def test_what_is_not_known_stays_as_it_is():
    error = RuntimeError("something else")
    assert cause_of(error, RUN) is error


def test_a_store_that_fails_the_controller_is_named():
    """As Ray reports it: the error of a process that died while it was made."""
    text = (
        "The actor died because of an error raised in its creation task, ray::TrainController.__init__() (pid=1)\n"
        "  File 'storage.py', line 262, in _exists_at_fs_path\n"
        "OSError: When listing objects under key 'runs/small' in bucket 'b': AWS Error NETWORK_CONNECTION"
    )
    error = cause_of(RuntimeError(text), RUN)
    assert isinstance(error, Unavailable), "the same command may work later"
    found = str(error)
    assert "storage does not answer" in found and "NETWORK_CONNECTION" in found
    assert "python -m jobs.train resume=/runs/small" in found
    assert "\n" not in found


def test_a_node_that_is_lost_while_it_prepares_is_one_line() -> None:
    text = "Training failed due to controller error:\nFailed to set up runtime environment.\nTraceback ..."
    found = cause_of(RuntimeError(text), RUN)
    assert isinstance(found, Unavailable) and f"go on with it: {RUN.resume}" in str(found) and "\n" not in str(found)
