"""A configuration's local paths made absolute: workers have another working directory."""

import os

from pipeline import store
from pipeline.commands import command, from_anywhere
from pipeline.config import CONF, Config
from pipeline.errors import PipelineError
from pipeline.ray_start import in_submitted_job
from pipeline.training import runs
from pipeline.training.checkpoint import STATE
from pipeline.weights import HUB


def absolute(key: str, value: str) -> str:
    """A local path made absolute: workers have another working directory."""
    value = value.removeprefix("file://")
    if store.is_remote(value) or os.path.isabs(value):
        return value
    if in_submitted_job():
        raise PipelineError(
            f"{key}={value} is a relative path, which in a submitted job leads into a folder that is thrown away: "
            "give an absolute path that all nodes share, or s3://bucket/prefix"
        )
    return os.path.abspath(value)


def with_absolute_paths(raw: Config) -> Config:
    """A composed configuration with every path in it absolute, and names of runs as their checkpoints."""
    data = {key: value for key, value in raw["data"].items() if key != "source"}  # its manifest tells that
    data["root"] = absolute("data.root", str(data["root"]))
    placed = {**raw, "data": data, "storage": absolute("storage", str(raw["storage"]))}
    if not in_submitted_job():  # there a relative path is refused, by whoever reaches for the store
        placed["tracking"] = from_anywhere(raw["tracking"])
    placed["backbone"] = with_absolute_files(raw["backbone"])
    return with_checkpoints(placed, placed["storage"])


def with_absolute_files(backbone: Config) -> Config:
    """A backbone's configuration with its local files made absolute."""
    placed = dict(backbone)
    if placed.get("weights", HUB) not in (HUB, None):
        placed["weights"] = absolute("backbone.weights", str(placed["weights"]))
    if placed.get("name") == "module" and placed.get("path") is not None:
        path = str(placed["path"]).removeprefix("file://")
        placed["path"] = os.path.abspath(path)  # read here, and sent to the workers
    if os.path.isdir(str(placed.get("model"))):
        placed["model"] = absolute("backbone.model", str(placed["model"]))
    return placed


def with_checkpoints(raw: Config, storage: str) -> Config:
    """``raw`` with the checkpoints that it begins with and is taught by, in place of names of runs in ``storage``."""
    placed = dict(raw)
    if raw.get("initial") is not None:
        placed["initial"] = _checkpoint("initial", str(raw["initial"]), storage)
    if raw["method"].get("teacher") is not None:
        teacher = _checkpoint("method.teacher", str(raw["method"]["teacher"]), storage)
        placed["method"] = {**raw["method"], "teacher": teacher}
    return placed


def _checkpoint(key: str, given: str, storage: str) -> str:
    """The checkpoint folder that ``key`` stands for: itself, or a run's chosen checkpoint."""
    if store.exists(store.join(given, STATE)):
        return absolute(key, given.rstrip("/"))
    for uri in store.places(given, storage):
        if store.exists(store.join(uri, runs.RUN_FILE)):
            return absolute(key, runs.best_checkpoint(uri))
    message = f"{key}={given}: neither a checkpoint's folder, nor a run's, nor the name of a run in {storage}"
    if given in (recipe.stem for recipe in (CONF / "recipe").glob("*.yaml")):  # recipes that begin with another's run
        message += f"; train it first: {command('train', f'recipe={given}', f'name={given}')}"
    raise PipelineError(message)
