"""Commands that are printed: they work when they are pasted, whatever is in their values."""

from __future__ import annotations

import shlex


def command(job: str, *arguments: str) -> str:
    """``python -m jobs.JOB ...``, quoted for a shell."""
    return f"python -m jobs.{job} {shlex.join(arguments)}"
