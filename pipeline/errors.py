"""The one exception for mistakes of the input, and how its messages name many things."""

from collections.abc import Iterable, Sequence


class PipelineError(Exception):
    """Something the user gave is wrong: what, where, and what to do, in one line.

    Jobs print the message without a traceback and exit with status 2. Every other exception is a bug.
    """


class Unavailable(PipelineError):
    """The object store, MLflow or the cluster does not answer, or has no room now: the same command may work later.

    Jobs exit with 75.
    """


class Diverged(PipelineError):
    """Training met a NaN or infinite loss: on all workers alike, and again wherever it is repeated."""


class Stopped(PipelineError):
    """The job was asked to end (SIGTERM) and did, with a checkpoint: no mistake of anybody's. Jobs exit with 143."""


def check_choice(key: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value of a key that is none of its choices."""
    if value not in (known := list(choices)):
        raise PipelineError(f"{key}={value!r} is none of {', '.join(known)}")


def some(names: Sequence[object], most: int = 3) -> str:
    """The first ``most`` names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(map(str, names[:most]))}{more}"
