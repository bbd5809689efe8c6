"""The command line of ``jobs.tune``: ``base.KEY=VALUE``, ``fix.KEY=VALUE``, and campaigns that are files."""

from __future__ import annotations

import os
import sys

from pipeline.config import Config, gather, literal
from pipeline.errors import PipelineError

GONE = {
    "batched": "every trial is computed by itself, with the same results but for rounding",
    "together": "trials of one worker use one process after the other, with the same results",
}


def translate(arguments: list[str]) -> list[str]:
    """Arguments for Hydra: ``base.KEY=VALUE`` gathered into ``overrides`` and ``fix.KEY=VALUE`` into ``fix``;
    ``campaign=FILE.yaml`` found by its folder; keys that are gone left out, with a warning.

    A campaign's file lies in a folder named ``campaign``, as Hydra wants it.
    """
    kept: list[str] = []
    for argument in arguments:
        if argument.startswith("campaign=") and argument.endswith((".yaml", ".yml")):
            kept += _file(argument.removeprefix("campaign="))
        elif (key := argument.lstrip("+~").partition("=")[0]) in GONE:
            _warn(key)
        else:
            kept.append(argument)
    return gather(kept, {"base": "overrides", "fix": "fix"})


def without_gone(raw: Config, warn: bool = True) -> Config:
    """A campaign's configuration without the keys that earlier releases had."""
    for key in GONE.keys() & raw.keys():
        if warn:
            _warn(key)
    return {key: value for key, value in raw.items() if key not in GONE}


def _warn(key: str) -> None:
    print(f"{key} is ignored and will be refused by the next release: {GONE[key]}", file=sys.stderr)


def _file(name: str) -> list[str]:
    path = os.path.abspath(os.path.expanduser(name))
    if not os.path.isfile(path):
        raise PipelineError(f"campaign={name}: there is no such file")
    folder, group = os.path.dirname(os.path.dirname(path)), os.path.basename(os.path.dirname(path))
    stem, ending = os.path.splitext(os.path.basename(path))
    if group != "campaign" or ending != ".yaml":
        raise PipelineError(f"campaign={name}: put it into a folder named campaign, as campaign/NAME.yaml")
    return [f"campaign={literal(stem)}", f"hydra.searchpath=[{literal(f'file://{folder}')}]"]
