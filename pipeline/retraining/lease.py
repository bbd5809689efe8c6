"""One retraining of a model at a time, on any machine, and none that waits for a dead one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from pipeline.errors import PipelineError
from pipeline.registry.locks import Taken, locked
from pipeline.registry.tracking import connect, reaching


class Busy(PipelineError):
    """Another retraining of the model is under way."""


@contextmanager
def lease(tracking: Mapping[str, Any], name: str, seconds: float) -> Iterator[Callable[[], None]]:
    """Hold the model's lease, or raise Busy. What is yielded checks that it is still held.

    A holder on this machine whose process ended, and one elsewhere that was silent for ``seconds``, are dead.
    """
    try:
        with ExitStack() as stack:
            with reaching(tracking, "nothing was done; run again"):
                client = connect(tracking).client
                is_held = stack.enter_context(locked(client, f"{name}.retraining-lock", seconds))

            def still_held() -> None:
                with reaching(tracking, "run again"):
                    if not is_held():
                        raise Busy(f"another retraining of {name!r} took over from this one")

            yield still_held
    except Taken as taken:
        raise Busy(
            f"another retraining of {name!r} is under way, {taken}; wait for it, or, if it died, for {seconds:g} s"
        ) from taken
