"""What every job does around its one function: arguments, one-line errors, exit codes, ``--json``."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.api import configuration
from pipeline.config import Config, help_text
from pipeline.errors import PipelineError, Stopped, Unavailable
from pipeline.files import to_json
from pipeline.ray_start import lost

INPUT_ERROR = 2
TRY_LATER = os.EX_TEMPFAIL  # 75
INTERRUPTED = 130
TERMINATED = 143
WORD = re.compile(r"[A-Za-z_]+")


class _Open(io.FileIO):
    """A stream of this process whose reader may go away (``| head -1``): what is written then is nobody's, and the
    work goes on."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except BrokenPipeError:
            return len(content)


def _speak() -> None:
    """Let no line of a job end it: neither a character that the terminal's encoding lacks, nor a reader that left."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):  # a program's own is left alone
            stream.flush()
            open_file = io.BufferedWriter(_Open(stream.fileno(), "w", closefd=False))
            kept = {"encoding": stream.encoding, "line_buffering": stream.line_buffering}
            setattr(sys, name, io.TextIOWrapper(open_file, errors="backslashreplace", write_through=True, **kept))


def main() -> None:
    """``meta-training JOB ...``: ``python -m jobs.JOB ...`` for folders that have a ``jobs`` of their own."""
    jobs = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    usage = f"meta-training JOB [key=value ...] [--json] [--help]; JOB is one of {', '.join(jobs)}"
    job = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if job in ("--help", "-h"):
        print(usage)
        sys.exit(0)
    if job not in jobs:
        print(f"error: there is no job {job!r}: {usage}", file=sys.stderr)
        sys.exit(INPUT_ERROR)
    del sys.argv[1]
    runpy.run_module(f"jobs.{job}", run_name="__main__", alter_sys=True)


def run(
    job: str,
    function: Callable[[Config], dict[str, Any]],
    argv: list[str] | None = None,
    word: str | None = None,
    translate: Callable[[list[str]], list[str]] = list,
) -> None:
    """Run ``function`` on the composed configuration and exit.

    Status 0: done; 2: the input was wrong, one line on stderr says how; 75: the object store, MLflow or the cluster did
    not answer, and the same command may work later; 130: interrupted; 143: asked to end by SIGTERM, and ended in order;
    1: a bug, with traceback;
    another where the summary has an "exit_code", which the job's help explains.
    With ``--json`` stdout holds the function's summary as one JSON object and nothing else.

    ``word`` is the key that a first argument without "=" is the value of; ``translate`` makes of arguments those that
    Hydra reads.
    """
    _speak()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(help_text(job, arguments))
        sys.exit(0)
    as_json = "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--json"]
    if word is not None and arguments and WORD.fullmatch(arguments[0]):
        arguments[0] = f"{word}={arguments[0]}"
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            summary = function(configuration(job, arguments, {}, translate))
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(TERMINATED)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(TRY_LATER if isinstance(error, Unavailable) else INPUT_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        gone = lost(error)
        if gone is None:
            raise
        print(f"error: {gone}", file=sys.stderr)
        sys.exit(TRY_LATER)
    if as_json:
        print(to_json(summary))
    sys.exit(int(summary.get("exit_code", 0)))
