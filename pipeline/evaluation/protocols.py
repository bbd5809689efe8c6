"""The protocols of ``jobs.evaluate`` behind one way in: every model by the same one, a table, and plain figures."""

import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field

from pipeline.config import Config, Section
from pipeline.config_kinds import Cluster, Count, Name
from pipeline.errors import PipelineError
from pipeline.evaluation.evaluate import EpisodicProtocol, Result, evaluate
from pipeline.evaluation.generalized import FineTuning, GeneralizedProtocol, GeneralizedResult, evaluate_joint
from pipeline.evaluation.model import Model
from pipeline.evaluation.one_shot_runs import HUMAN_ERROR, OneShotResult, evaluate_one_shot_runs
from pipeline.evaluation.spread import EmbeddedSplits
from pipeline.evaluation.statistics import paired
from pipeline.ray_start import in_submitted_job
from pipeline.tables import percent, text_table
from pipeline.weights import origin_of

_as_list = BeforeValidator(lambda value: [value] if type(value) is int else value)
Counts = Annotated[list[Count], _as_list, Field(min_length=1)]


def _as_workers_see(place: str) -> str:
    """A local path made absolute: workers of a cluster that is joined have another working directory. Those of a
    submitted job have its files."""
    place = place.removeprefix("file://")
    return place if "://" in place or in_submitted_job() else os.path.abspath(place)


Place = Annotated[Name, AfterValidator(_as_workers_see)]  # of a dataset


class EvaluateConfig(Section):
    """Keys of ``conf/evaluate.yaml``."""

    run: str | None
    model: str | None
    compare: str | None
    untrained: bool
    storage: str
    dataset: Place | None
    seen: bool
    protocol: Literal["episodic", "generalized", "one_shot_runs"]
    runs: str | None
    split: str
    episodes: Count
    way: Counts
    shot: Counts
    query: Count
    tasks: Count
    seed: int
    fine_tune: FineTuning | None
    output: str | None
    record: str | None
    publish: bool
    cluster: Cluster
    tracking: dict[str, Any]


Measured = Sequence[tuple[Model, Sequence[Result | OneShotResult | GeneralizedResult]]]


def measure(
    config: EvaluateConfig,
    models: Sequence[Model],
    dataset: str | None,
    trained: Config | None,
    once: EmbeddedSplits | None = None,
) -> Measured:
    """Every model by the protocol of the configuration, whose table is printed.

    Args:
        dataset: its folder or URI; the one-shot runs need none.
        trained: the configuration that the first model was trained with, where it is known; generalized needs it.
        once: of the first model, for episodes.
    """
    gpus = config.cluster.gpus_per_worker
    if config.protocol == "one_shot_runs":
        if config.runs is None:
            raise PipelineError("protocol=one_shot_runs needs runs=PATH, Lake's archive of the 20 one-shot runs")
        runs = [(model, [evaluate_one_shot_runs(model, config.runs)]) for model in models]
        _print_one_shot_runs(runs)
        return runs
    if dataset is None:
        raise PipelineError("the model does not say what it was trained on: give dataset=FOLDER")
    if config.protocol == "generalized":
        if trained is None:
            raise PipelineError("protocol=generalized needs run=NAME, whose training split and holdout it measures")
        about = dataset, trained["train"]["split"], trained["train"]["holdout"], config.split
        how = config.query, config.episodes, config.seed
        joint = [
            evaluate_joint(models[0], GeneralizedProtocol(*about, shot, *how, tuning), gpus)
            for shot in config.shot
            for tuning in dict.fromkeys([None, config.fine_tune])  # as imprinted and, where asked for, fine-tuned
        ]
        _print_generalized(joint)
        return [(models[0], joint)]
    protocols = [
        EpisodicProtocol(dataset, config.split, way, shot, config.query, config.episodes, config.seed, config.tasks)
        for way in config.way
        for shot in config.shot
    ]
    first = {0: once}
    episodic = [(model, evaluate(model, protocols, gpus, once=first.get(n))) for n, model in enumerate(models)]
    print_episodic(episodic)
    return episodic


def figures(measured: Measured) -> list[dict[str, Any]]:
    """Every result as plain values, with the accuracy of every episode or run where models are compared by them."""
    found = []
    for model, results in measured:
        for result in results:
            entry = {"model": model.label, **result.summary()}
            if isinstance(result.accuracies, np.ndarray):
                entry["accuracies"] = result.accuracies.tolist()
            found.append(entry)
    return found


def compare(measured: Measured) -> list[dict[str, Any]]:
    """The first model minus the last one, on the same episodes or runs; printed, and as plain values."""
    (first, ours), (last, theirs) = measured[0], measured[-1]
    rows, out = [], []
    for a, b in zip(ours, theirs, strict=True):
        assert not isinstance(a, GeneralizedResult) and not isinstance(b, GeneralizedResult)
        found = paired(b.accuracies, a.accuracies)
        name = a.protocol.name
        out.append({"question": name, **vars(found)})
        rows.append([name, f"{100 * found.difference:+.2f}", f"{100 * found.low:+.2f} … {100 * found.high:+.2f}"])
    print(f"\n{first.label} minus {last.label}, same episodes, points of accuracy:")
    print(text_table(["episodes", "difference", f"{100 * found.confidence:.0f} % interval"], rows), flush=True)
    return out


def print_episodic(measured: Sequence[tuple[Model, list[Result]]]) -> None:
    """A row per model, a column per kind of episode."""
    protocols = [result.protocol for result in measured[0][1]]
    header = ["accuracy, %", *(protocol.name for protocol in protocols)]
    rows = [[m.label, *(percent(r.estimate.mean, r.estimate.interval) for r in results)] for m, results in measured]
    p = protocols[0]
    print(f"\n{p.episodes:,} episodes of split {p.split!r}, {p.query} queries per class, mean ± 95 % interval")
    print(text_table(header, rows), flush=True)
    for model, _ in measured:
        if (pretrained := origin_of(model.spec, model.dataset)) is not None:
            print(f"{model.label}: {pretrained}", flush=True)


def _print_one_shot_runs(measured: Sequence[tuple[Model, list[OneShotResult]]]) -> None:
    rows = [[m.label, percent(r.estimate.mean, r.estimate.interval)] for m, [r] in measured]
    rows.append(["people", f"{100 * (1 - HUMAN_ERROR):.2f}"])
    print("\n20 runs of 20 one-shot trials within an alphabet, mean ± 95 % interval over the runs")
    print(text_table(["accuracy, %", "20-way 1-shot"], rows), flush=True)


def _print_generalized(results: Sequence[GeneralizedResult]) -> None:
    rows = []
    for result in results:
        found = result.estimates()
        kind = "imprinted" if result.protocol.fine_tuning is None else "imprinted, fine-tuned"
        shown = [percent(found[name].mean, found[name].interval) for name in ("novel", "base", "all", "novel_only")]
        rows.append([str(result.protocol.shot), kind, *shown])
    header = ["n", "classifier", "novel (joint)", "base (joint)", "all (joint)", "novel among novel"]
    print(text_table(header, rows), flush=True)
