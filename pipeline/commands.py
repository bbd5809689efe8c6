"""Commands that are printed: they work when they are pasted, in any folder and whatever is in their values."""

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pipeline.files import in_uri

_WHOLE: ContextVar[str | None] = ContextVar("whole", default=None)
_SQLITE, _SCHEME = "sqlite:///", re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def command(job: str, *arguments: str) -> str:
    """``python -m jobs.JOB ...``, quoted for a shell."""
    return f"python -m jobs.{job} {shlex.join(arguments)}"


@contextmanager
def part_of(whole: str | None) -> Iterator[None]:
    """What is done in here is a part of a larger job, whose command goes on with it; None: it stands alone."""
    before = _WHOLE.set(whole)
    try:
        yield
    finally:
        _WHOLE.reset(before)


def going_on(alone: str) -> str:
    """The command to be printed for going on: ``alone``, or that of the job which this is a part of."""
    return _WHOLE.get() or alone


def data_root(root: str) -> list[str]:
    """The argument that says where datasets are, where that is not the usual folder."""
    usual = os.path.join(os.environ.get("PIPELINE_HOME", "."), "datasets")
    return [] if "://" not in root and os.path.abspath(root) == os.path.abspath(usual) else [f"data.root={root}"]


def from_anywhere(tracking: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``tracking`` with local paths made absolute: the same store, whatever the working directory is."""
    found = dict(tracking)
    uri, artifacts = found.get("uri"), found.get("artifacts")
    if isinstance(uri, str) and uri.startswith(_SQLITE):
        found["uri"] = _SQLITE + os.path.abspath(os.path.join(in_uri(os.getcwd()), uri.removeprefix(_SQLITE)))
    if isinstance(artifacts, str) and not _SCHEME.match(artifacts):
        found["artifacts"] = os.path.abspath(artifacts)
    return found
