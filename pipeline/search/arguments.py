"""The command line of ``jobs.tune``: ``base.KEY=VALUE``, ``fix.KEY=VALUE``, and campaigns that are files."""

from __future__ import annotations

import os

from pipeline.errors import PipelineError


def translate(arguments: list[str]) -> list[str]:
    """Arguments for Hydra: ``base.KEY=VALUE`` gathered into ``overrides`` and ``fix.KEY=VALUE`` into ``fix``;
    ``campaign=FILE.yaml`` found by its folder.

    A campaign's file lies in a folder named ``campaign``, as Hydra wants it.
    """
    kept: list[str] = []
    gathered: dict[str, list[str]] = {"overrides": [], "fix": []}
    for argument in arguments:
        if argument.startswith("base."):
            gathered["overrides"].append(argument.removeprefix("base."))
        elif argument.startswith("fix."):
            gathered["fix"].append(argument.removeprefix("fix."))
        elif argument.startswith("campaign=") and argument.endswith((".yaml", ".yml")):
            kept += _file(argument.removeprefix("campaign="))
        else:
            kept.append(argument)
    for key, values in gathered.items():
        if values and any(argument.startswith(f"{key}=") for argument in kept):
            short = {"overrides": "base", "fix": "fix"}[key]
            raise PipelineError(f"give {short}.KEY=VALUE or {key}=[...], not both")
        if values:
            kept.append(f"{key}=[{','.join(map(_quoted, values))}]")
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
