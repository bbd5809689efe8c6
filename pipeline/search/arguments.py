"""The command line of ``jobs.tune``: ``base.KEY=VALUE``, ``fix.KEY=VALUE``, and campaigns that are files."""

from __future__ import annotations

import os

from pipeline.config import gather
from pipeline.errors import PipelineError


def translate(arguments: list[str]) -> list[str]:
    """Arguments for Hydra: ``base.KEY=VALUE`` gathered into ``overrides`` and ``fix.KEY=VALUE`` into ``fix``;
    ``campaign=FILE.yaml`` found by its folder.

    A campaign's file lies in a folder named ``campaign``, as Hydra wants it.
    """
    kept: list[str] = []
    for argument in arguments:
        if argument.startswith("campaign=") and argument.endswith((".yaml", ".yml")):
            kept += _file(argument.removeprefix("campaign="))
        else:
            kept.append(argument)
    return gather(kept, {"base": "overrides", "fix": "fix"})


def _file(name: str) -> list[str]:
    path = os.path.abspath(name)
    if not os.path.isfile(path):
        raise PipelineError(f"campaign={name}: there is no such file")
    folder, group = os.path.dirname(os.path.dirname(path)), os.path.basename(os.path.dirname(path))
    stem, ending = os.path.splitext(os.path.basename(path))
    if group != "campaign" or ending != ".yaml":
        raise PipelineError(f"campaign={name}: put it into a folder named campaign, as campaign/NAME.yaml")
    return [f"campaign={stem}", f"hydra.searchpath=[file://{folder}]"]
