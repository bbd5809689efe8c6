"""Imported by every process of a Ray that was started for a run, before it is given work: see ``beforehand``."""

import contextlib
import os

from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR

TICKETS = "PIPELINE_TICKETS"  # the folder of those who are to import what a training worker needs


def ticket() -> bool:
    """Take one, if there is one."""
    folder = os.environ.get(TICKETS)
    if folder is None or RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR not in os.environ:  # Ray Train's own have it
        return False
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))
                return True
    return False


if ticket():
    import pipeline.training.worker  # noqa: F401
