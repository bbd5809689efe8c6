"""The pipeline in Python: what the jobs do, as functions that take arguments and return objects.

``from pipeline import ingest, train, evaluate, tune, load`` gives them. Each takes the keys of the job of the same name
(``python -m jobs.NAME --help`` shows them), as text, as keyword arguments, or both::

    train("recipe=demo", steps=100, data="glyphs", **{"method.scale": 2})
    train(recipe="demo", train={"way": 10, "query": 5})

They print what the jobs print, may be called again and again in one process, in which Ray keeps running, and raise
:class:`~pipeline.errors.PipelineError` with one line for whatever is wrong with what they were given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import store
from pipeline.config import Config, compose, literal
from pipeline.credentials import refuse_logins, split_login
from pipeline.errors import PipelineError
from pipeline.registry.tracking_config import registering

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from pipeline.inference.estimator import Classifier


@dataclass(frozen=True)
class Dataset:
    """An ingested dataset."""

    name: str
    folder: str  # or URI
    shape: tuple[int, int, int]  # channels, height and width of every image
    images: int
    classes: dict[str, list[str]] = field(repr=False)  # names of each split's classes; each also counts rotated
    rotations: list[int]  # degrees by which every class makes a class of its own; [0]: none
    skipped: dict[str, int]  # files left out, by reason
    fingerprint: str

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(names) * len(self.rotations):,} {split}" for split, names in self.classes.items())
        return f"Dataset({self.name!r}, {self.images:,} images of {'×'.join(map(str, self.shape))}, classes: {counts})"


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Accuracies, with 95 % intervals over episodes."""

    table: pd.DataFrame  # a row per model, way and shot; accuracy and interval are fractions of one
    accuracies: list[np.ndarray]  # of every episode [episodes] float64, an array per row; empty for a training's own
    comparison: pd.DataFrame | None = None  # differences from ``compare``, on the same episodes; None: not asked for

    def __repr__(self) -> str:
        shown = self.table.to_string(index=False)
        return shown if self.comparison is None else f"{shown}\n\n{self.comparison.to_string(index=False)}"


@dataclass(frozen=True, repr=False)
class Run:
    """A finished training."""

    name: str
    folder: str  # or URI; holds the checkpoints and report/
    checkpoint: str  # the one that the run stands for
    evaluation: Evaluation | None  # of that checkpoint; None where evaluation=None
    model: str | None  # models:/NAME/VERSION, for load(); None: not registered
    mlflow_run: str | None  # id of the run in MLflow
    tracking: str | None  # address of that MLflow store

    def __repr__(self) -> str:
        return f"Run({self.name!r}, {self.model or 'not registered'}, {self.folder})"

    @cached_property
    def history(self) -> pd.DataFrame:
        """What was logged: a row per logged step, with train/loss, val/accuracy, val/interval and others as columns."""
        import pandas as pd

        from pipeline.training.runs import checkpoints

        state = json.loads(store.read_bytes(store.join(checkpoints(self.folder)[-1], "state.json")))
        entries = pd.DataFrame(state["history"])
        return entries.groupby("step").first()  # training and validation are logged apart


@dataclass(frozen=True, repr=False)
class Campaign:
    """A finished search."""

    name: str
    folder: str
    trials: pd.DataFrame  # a row per trial, with its values as columns, accuracy, status and reason
    best: dict[str, Any] | None  # values, accuracy, run, and config, a file for train(config=...); None: none finished
    statement: str  # whether the best is better than the default, in one sentence
    model: str | None  # models:/NAME/VERSION of the best; None: not registered

    def __repr__(self) -> str:
        found = "no trial finished" if self.best is None else f"best {self.best['values']}"
        return f"Campaign({self.name!r}, {len(self.trials)} trials, {found})"


def ingest(*overrides: str, **options: Any) -> Dataset:
    """Turn images into a dataset of shards.

    Args:
        overrides: ``"key=value"`` as on the command line of ``jobs.ingest``.
        options: the same as keyword arguments, such as ``data="folder"`` or ``**{"data.source.path": "photos"}``.

    Returns:
        What was written.

    Raises:
        PipelineError: the input is refused, or the dataset is there already (``overwrite=True`` replaces it).
    """
    from pipeline.data.ingest import ingest as run

    config = configuration("ingest", overrides, options)
    manifest = run(config)
    names = {split: [manifest.class_names[member] for member in members] for split, members in manifest.splits.items()}
    return Dataset(
        manifest.name, store.join(config["data"]["root"], config["data"]["name"]), manifest.shape, manifest.rows, names,
        manifest.rotations, manifest.skipped, manifest.fingerprint,
    )  # fmt: skip


def train(*overrides: str, **options: Any) -> Run:
    """Train a run (or go on with one: ``resume=NAME``), evaluate it and register its model.

    Args:
        overrides: ``"key=value"`` as on the command line of ``jobs.train``.
        options: the same as keyword arguments, such as ``recipe="demo"``, ``steps=100`` or ``cluster={"workers": 1}``.

    Returns:
        The run, with its history, evaluation and registered model.

    Raises:
        PipelineError: an argument or the dataset is wrong, or the loss became NaN or infinite.
    """
    from pipeline.workflow import train as run

    made = run(configuration("train", overrides, options))
    found = made.get("evaluation")
    return Run(
        made["run"], made["folder"], made["checkpoint"], None if found is None else _evaluation({"results": found}),
        made.get("model"), made.get("mlflow_run"), made.get("tracking"),
    )  # fmt: skip


def evaluate(subject: str | Path | Run | None = None, *overrides: str, **options: Any) -> Evaluation:
    """Measure a run or a registered model on fixed episodes.

    Args:
        subject: a :class:`Run`, the name or folder of one, or ``"models:/NAME@ALIAS"``.
        overrides: ``"key=value"`` as on the command line of ``jobs.evaluate``.
        options: the same as keyword arguments, such as ``way=[5, 20]``, ``shot=1`` or ``compare="OTHER_RUN"``.

    Returns:
        A table with a row per model, way and shot, and the accuracy of every episode.

    Raises:
        PipelineError: there is no such run or model, or the dataset cannot serve the episodes.
    """
    from pipeline.training.runs import read_run
    from pipeline.workflow import evaluate_job

    if isinstance(subject, str) and "=" in subject:
        overrides = (subject, *overrides)
    elif subject is not None:
        name = subject.folder if isinstance(subject, Run) else os.fspath(subject)
        if isinstance(subject, Run) and (tracked := _tracked(subject, overrides, options)):
            experiment = read_run(subject.folder).config["tracking"]["experiment"]
            overrides = (*tracked, f"tracking.experiment={literal(experiment)}", *overrides)
        options = {"model" if name.startswith("models:") else "run": name, **options}
    if isinstance(options.get("compare"), Run):
        options["compare"] = options["compare"].folder
    return _evaluation(evaluate_job(configuration("evaluate", overrides, options)))


def tune(*overrides: str, **options: Any) -> Campaign:
    """Search hyperparameters (or go on with a search: ``resume=NAME``).

    Args:
        overrides: ``"key=value"`` as on the command line of ``jobs.tune``.
        options: the same as keyword arguments, such as ``campaign="metric_scale"``, ``trials=10``,
            ``base={"data": "omniglot", "steps": 500}`` or ``fix={"method": "maml"}``.

    Returns:
        The trials and the best configuration.

    Raises:
        PipelineError: the space or an argument is wrong.
    """
    from pipeline.search.arguments import translate
    from pipeline.search.run import tune as run

    for part in ("base", "fix"):
        if isinstance(options.get(part), Mapping):
            options |= {f"{part}.{key}": value for key, value in options.pop(part).items()}
    return _campaign(run(configuration("tune", overrides, options, translate)))


def load(model: str | Path | Run, *overrides: str, device: str = "cpu", **options: Any) -> Classifier:
    """A trained model as a classifier with scikit-learn's manners.

    Args:
        model: ``"models:/NAME@ALIAS"`` or ``"models:/NAME/VERSION"`` of the registry, a :class:`Run` (its registered
            model), or a folder that holds ``model.json`` and ``weights.safetensors``.
        overrides: where the registry is, as ``"tracking.uri=URI"`` or ``"tracking=server"``.
        device: ``"cpu"`` or ``"cuda"``.
        options: the same as keyword arguments, such as ``tracking="server"``.

    Returns:
        A classifier with ``fit``, ``predict``, ``predict_proba`` and ``classes_``.

    Raises:
        PipelineError: there is no such model, or it is damaged.
    """
    from pipeline.inference.estimator import Classifier
    from pipeline.registry.classify import load_classifier

    if isinstance(model, Run):
        if model.model is None:
            given = {"uri": model.tracking} if model.tracking else {}
            raise PipelineError(f"run {model.name} is not registered: {registering(model.folder, given)}")
        overrides = (*_tracked(model, overrides, options), *overrides)
        model = model.model
    config = configuration("classify", overrides, {"model": os.fspath(model), **options})
    return Classifier(load_classifier(config["model"], config["tracking"], device))


def configuration(
    job: str,
    overrides: Sequence[str],
    options: Mapping[str, Any],
    translate: Callable[[list[str]], list[str]] = list,
) -> Config:
    """Of a job, refused where it holds a login; ``translate`` makes of arguments those that Hydra reads."""
    arguments = [*overrides, *(f"{key}={literal(value)}" for key, value in options.items())]
    split_login(os.environ)
    refuse_logins(arguments)  # before anything else could repeat one
    config = compose(job, translate(arguments))
    refuse_logins((), config)
    return config


def _tracked(run: Run, overrides: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """The argument that names the MLflow store which a run is in, unless another one is asked for."""
    given = {override.partition("=")[0] for override in overrides} | options.keys()
    asked = run.tracking is None or given & {"tracking", "tracking.uri"}
    return [] if asked else [f"tracking.uri={literal(run.tracking)}"]


def _evaluation(summary: Mapping[str, Any]) -> Evaluation:
    import numpy as np
    import pandas as pd

    rows = [{key: value for key, value in row.items() if key != "accuracies"} for row in summary["results"]]
    accuracies = [np.asarray(row["accuracies"]) for row in summary["results"] if "accuracies" in row]
    compared = summary.get("comparison")
    return Evaluation(pd.DataFrame(rows), accuracies, None if compared is None else pd.DataFrame(compared))


def _campaign(summary: Mapping[str, Any]) -> Campaign:
    import pandas as pd

    trials = pd.DataFrame([{**row.pop("values"), **row} for row in map(dict, summary["trials"])])
    return Campaign(
        summary["campaign"], summary["folder"], trials, summary.get("best"), summary.get("statement", ""),
        summary.get("model"),
    )  # fmt: skip
