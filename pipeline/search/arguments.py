"""The command line of ``jobs.tune``: ``base.KEY=VALUE``, and campaigns that are files."""

from __future__ import annotations

import os

from pipeline.errors import PipelineError


def translate(arguments: list[str]) -> list[str]:
    """Arguments for Hydra: ``base.KEY=VALUE`` gathered into ``overrides``, ``campaign=FILE.yaml`` found by its folder.

    A campaign's file lies in a folder named ``campaign``, as Hydra wants it.
    """
    kept: list[str] = []
    gathered: list[str] = []
    for argument in arguments:
        if argument.startswith("base."):
            gathered.append(argument.removeprefix("base."))
        elif argument.startswith("campaign=") and argument.endswith((".yaml", ".yml")):
            kept += _file(argument.removeprefix("campaign="))
        else:
            kept.append(argument)
    if gathered:
        if any(argument.startswith("overrides=") for argument in kept):
            raise PipelineError("give base.KEY=VALUE or overrides=[...], not both")
        kept.append(f"overrides=[{','.join(map(_quoted, gathered))}]")
    return kept


def _file(name: str) -> list[str]:
    path = os.path.abspath(name)
    if not os.path.isfile(path):
        raise PipelineError(f"campaign={name}: there is no such file")
    folder, group = os.path.dirname(os.path.dirname(path)), os.path.basename(os.path.dirname(path))
    stem, ending = os.path.splitext(os.path.basename(path))
    if group != "campaign" or ending != ".yaml":
        raise PipelineError(f"campaign={name}: put it into a folder named campaign, as campaign/NAME.yaml")
    return [f"campaign={stem}", f"hydra.searchpath=[file://{folder}]"]


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'
