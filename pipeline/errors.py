"""The one exception for mistakes of the input."""


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
