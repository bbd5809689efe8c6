"""Weights that a run begins with: another run's, where they fit."""

from __future__ import annotations

from pipeline.errors import PipelineError
from pipeline.methods.base import Method
from pipeline.training.checkpoint import load_checkpoint

BACKBONE = "backbone."


def begin_with(method: Method, uri: str) -> list[str]:
    """Give a method the weights of the checkpoint at ``uri``; the names of those that stay as the seed made them.

    Everything of the backbone must fit. Beyond it (a layer with an output a training class, say) what has another name
    or shape stays.

    Raises:
        PipelineError: the backbone is another one, or there is no checkpoint.
    """
    given, own = load_checkpoint(uri).model, method.state_dict()
    fitting = {name: tensor for name, tensor in given.items() if name in own and own[name].shape == tensor.shape}
    left = [name for name in own if name not in fitting]
    wrong = [name for name in left if name.startswith(BACKBONE)]
    if wrong or not fitting:
        what = f"{wrong[0]!r} is missing or of another shape" if wrong else "no weight fits"
        raise PipelineError(f"initial={uri}: these are weights of another model ({what}); train from scratch")
    method.load_state_dict({**own, **fitting})
    return left
