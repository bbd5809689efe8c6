"""The command line of ``jobs.tune`` (``base.KEY=VALUE``, ``fix.KEY=VALUE``, campaigns that are files), and what no
campaign may touch: the test split, the episodes of its objective, and what is not a trial's own."""

import os
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from pipeline.config import Config, gather, literal, unquoted
from pipeline.data.dataset import class_table
from pipeline.data.manifest import Manifest
from pipeline.errors import PipelineError
from pipeline.renamed import current_key

GONE = {
    "batched": "every trial is computed by itself, with the same results but for rounding",
    "together": "trials of one worker use one process after the other, with the same results",
}
OBJECTIVE = ("split", "seed", "episodes", "way", "shot", "query")  # of validation: fixed for the whole campaign
TEST = "test"
_OWN = {  # keys of jobs.train that a campaign sets by itself
    "name": "trials are named by the campaign",
    "storage": "set the campaign's storage",
    "resume": "set the campaign's resume",
    "tracking": "set the campaign's tracking",
    "register_as": "set the campaign's register_as",
}
_COMMON = {  # keys that all trials have in common
    "data": "all trials have one dataset",
    "recipe": "a recipe may set the validation episodes; put it into base",
    "seed": "the finalists are trained with several seeds: finalists.seeds",
    "cluster": "set it in base",
    "validation": "the objective is the same for all trials",
}


def translate(arguments: list[str]) -> list[str]:
    """Arguments for Hydra: ``base.KEY=VALUE`` gathered into ``overrides`` and ``fix.KEY=VALUE`` into ``fix``;
    ``campaign=FILE.yaml`` found by its folder; keys that are gone left out, with a warning.

    A campaign's file lies in a folder named ``campaign``, as Hydra wants it.
    """
    kept: list[str] = []
    for argument in arguments:
        name = unquoted(argument.removeprefix("campaign="))
        if argument.startswith("campaign=") and name.endswith((".yaml", ".yml")):
            kept += _file(name)
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


def key_of(override: str) -> str:
    """``train.way`` of ``++train.way=5``, ``data`` of ``data@x=omniglot``."""
    return current_key(override.lstrip("+~").partition("=")[0].partition("@")[0].strip())


def check_arguments(arguments: Iterable[str], where: str) -> None:
    """Refuse, of arguments that all trials have, what would touch the test split or the objective."""
    for argument in arguments:
        if "=" not in argument and not argument.startswith("~"):
            raise PipelineError(f"{where}: {argument!r} is not key=value")
        key, value = key_of(argument), argument.partition("=")[2]
        top, _, rest = key.partition(".")
        if top == "evaluation" and value != "null":
            raise PipelineError(f"{where}: {argument}: a search never touches the test split: evaluation stays null")
        if top == "validation" and (not rest or rest.partition(".")[0] in OBJECTIVE):
            raise PipelineError(
                f"{where}: {argument}: the validation episodes are the campaign's: set objective.{rest}"
            )
        if key == "train.split":
            check_split(key, value)
        if top in _OWN and not (top == "register_as" and value == "null"):
            raise PipelineError(f"{where}: {argument}: {_OWN[top]}")


def check_searched(keys: Iterable[str], where: str = "space") -> None:
    """Refuse, of keys that differ between trials, what must not."""
    for key in keys:
        top = key_of(key).partition(".")[0]
        if top == "evaluation":
            raise PipelineError(f"{where}.{key}: a search never touches the test split: evaluation stays null")
        if key_of(key) == "train.split":
            raise PipelineError(f"{where}.{key}: all trials train on one split: put it into base")
        reason = _OWN.get(top) or _COMMON.get(top)
        if reason and key_of(key) != "validation.patience":
            raise PipelineError(f"{where}.{key}: {reason}")


def check_split(key: str, split: Any) -> None:
    if TEST in str(split).strip("'\"").split("+"):
        raise PipelineError(f"{key}={split}: a search never touches the test split")


def check_classes(manifest: Manifest, config: Config) -> None:
    """Refuse training or validation on classes of the test split, and validation on classes of training."""
    splits = {"train.split": config["train"]["split"], "validation.split": config["validation"]["split"]}
    classes = {}
    for key, split in splits.items():
        check_split(key, split)
        classes[key] = class_table(manifest, split).ids
        if TEST in manifest.splits and np.intersect1d(classes[key], class_table(manifest, TEST).ids).size:
            raise PipelineError(f"{key}={split}: it has classes of the dataset's test split")
    if np.intersect1d(classes["train.split"], classes["validation.split"]).size:
        train, validation = splits.values()
        raise PipelineError(
            f"train.split={train}: it has classes of validation.split={validation}, on which trials are compared: "
            "set base.train.split=train"
        )


def check_trial(trial: Config, base: Config) -> None:
    """Refuse a trial that would be measured otherwise than the base configuration, however that came about."""
    for key in OBJECTIVE:
        if trial["validation"][key] != base["validation"][key]:
            raise PipelineError(
                f"validation.{key}={trial['validation'][key]}: all trials have {base['validation'][key]}"
            )
    for key in ("data", "evaluation"):
        if trial[key] != base[key]:
            raise PipelineError(f"{key} differs from the base configuration's")
    if trial["train"]["split"] != base["train"]["split"]:
        raise PipelineError(f"train.split={trial['train']['split']}: all trials have {base['train']['split']}")
