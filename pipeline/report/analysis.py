"""What ``jobs.report`` does: the README's tables, published against measured figures, comparisons of trained runs."""

from __future__ import annotations

import json
from typing import Any

import torch

from pipeline.config import Config, validate
from pipeline.errors import PipelineError
from pipeline.evaluation import clustering, cross_table
from pipeline.evaluation.embeddings import embed_classes
from pipeline.evaluation.evaluate import Model, Question
from pipeline.evaluation.extractor import kind, matched
from pipeline.functional.clustering import class_spread, spread_clustering
from pipeline.inference.files import write_atomic
from pipeline.pages.build import make_pages
from pipeline.report import measured, reproduction
from pipeline.report.config import ReportConfig
from pipeline.report.embeddings import side_by_side
from pipeline.report.style import Kind
from pipeline.tables import text_table
from pipeline.training.checkpoint import Checkpoint, load_checkpoint
from pipeline.training.cluster import check_resources, start_ray
from pipeline.training.runs import Run, best_checkpoint, find_run


def report(raw: Config) -> dict[str, Any]:
    """Make the report ``what``; with ``record`` its figures are written as JSON too."""
    config = validate(ReportConfig, raw)
    if config.what == "readme":
        write_atomic(measured.README, measured.readme_text(measured.README.read_text()).encode())
        print(f"{measured.README.name} is up to date")
        return {"readme": str(measured.README)}
    if config.what == "reproduction":
        return _reproduction(config)
    if config.what == "pages":
        return _pages(config)
    if config.what == "campaign":
        return _campaign(config)
    subjects = _Subjects(config)
    if config.what == "embeddings":
        found = _embeddings(config, subjects)
    else:
        start_ray(config.cluster)
        check_resources(config.cluster)
        found = (_cross_table if config.what == "cross_table" else _clustering)(config, subjects)
        content = {"runs": subjects.described(), **found}
        print(measured.COMPARISONS[config.what](content, text_table), flush=True)
    if config.record:
        measured.record_comparison(config.record, subjects.trained, found, config.what)
        print(f"recorded in {config.record}")
    return {"runs": subjects.described(), **found}


def _campaign(config: ReportConfig) -> dict[str, Any]:
    from pipeline.report import campaigns

    if len(config.runs) != 1 or config.record is None:
        raise PipelineError("campaign needs runs=[NAME], a campaign's name, and record=FILE for what it found")
    found = campaigns.record_campaign(config.record, config.runs[0], config.storage, measured.machine())
    print(f"{found['statement']}\nrecorded in {config.record}", flush=True)
    return found


class _Subjects:
    """The runs that are compared, with their models and the dataset that they share."""

    def __init__(self, config: ReportConfig) -> None:
        if not config.runs:
            raise PipelineError(f"{config.what} needs runs=[NAME,...], the trained runs to compare")
        if len(set(config.runs)) < len(config.runs):
            raise PipelineError(f"runs={config.runs}: every run once")
        runs = [find_run(name, config.storage) for name in config.runs]
        loaded = [(run, load_checkpoint(best_checkpoint(run.uri))) for run in runs]
        self.models = [Model(c.spec, c.model, run.name, c.dataset["uri"]) for run, c in loaded]
        self.trained: list[tuple[Run, Checkpoint, str]] = [
            (run, checkpoint, kind(model)) for (run, checkpoint), model in zip(loaded, self.models, strict=True)
        ]
        known = {c.dataset["fingerprint"]: c.dataset for _, c in loaded}
        if config.dataset is None and len(known) > 1:
            names = ", ".join(sorted({str(d["name"]) for d in known.values()}))
            raise PipelineError(f"the runs were trained on different datasets ({names}): give dataset=FOLDER")
        self.dataset = config.dataset or str(next(iter(known.values()))["uri"])

    def described(self) -> list[dict[str, Any]]:
        return [
            {"name": run.name, "kind": kind, "method": checkpoint.spec["method"]["name"], "steps": checkpoint.step}
            for run, checkpoint, kind in self.trained
        ]


def _pages(config: ReportConfig) -> dict[str, Any]:
    found = make_pages(config.tracking.model_dump(), config.output or "pages")
    for problem in found["problems"]:
        print(f"left out: {problem}")
    print(f"{len(found['pages'])} pages; begin with {found['index']}")
    return found


def _reproduction(config: ReportConfig) -> dict[str, Any]:
    entries = reproduction.entries(measured.FOLDER)
    print(reproduction.text(entries))
    found = {"methods": reproduction.summary(entries)}
    if config.record:
        write_atomic(config.record, (json.dumps(found, indent=1) + "\n").encode())
        print(f"recorded in {config.record}")
    return found


def _cross_table(config: ReportConfig, subjects: _Subjects) -> dict[str, Any]:
    keys = ("split", "way", "shot", "query", "episodes", "seed")
    asked = {key: getattr(config, key) for key in keys}
    question = Question(subjects.dataset, **asked, tasks=config.tasks)
    fine_tune = cross_table.FineTune(config.fine_tune.steps, config.fine_tune.lr, config.fine_tune.norm)
    table = cross_table.cross_table(subjects.models, question, config.heads, fine_tune, config.cluster.gpus_per_worker)
    results = []
    for model in subjects.models:
        for head in config.heads:
            cell = table.cell(model.label, head)
            results.append({"run": model.label, "head": head, "accuracy": cell.mean, "interval": cell.interval})
    comparisons = [
        {"meta": meta.label, "classical": classical.label, "head": head, **vars(comparison)}
        for meta, classical, head, comparison in table.comparisons()
    ]
    return {"question": asked, "fine_tune": vars(fine_tune), "results": results, "comparisons": comparisons}


def _clustering(config: ReportConfig, subjects: _Subjects) -> dict[str, Any]:
    question = clustering.ClusteringQuestion(subjects.dataset, config.split, config.pairs, config.seed)
    found = {
        model.label: clustering.measure_clustering(model, question, config.cluster.gpus_per_worker)
        for model in subjects.models
    }
    results = [{"run": label, **result.summary()} for label, result in found.items()]
    comparisons = [
        {"meta": meta.label, "classical": classical.label, "measure": measure, **vars(comparison)}
        for meta, classical in matched(subjects.models)
        for measure, comparison in clustering.compare(found[meta.label], found[classical.label]).items()
    ]
    return {"results": results, "comparisons": comparisons}


def _embeddings(config: ReportConfig, subjects: _Subjects) -> dict[str, Any]:
    output = config.output or "embeddings.png"
    if not output.endswith((".png", ".svg")):
        raise PipelineError(f"output={output}: a picture is a .png or an .svg")
    seen = [
        embed_classes(model, subjects.dataset, config.split, config.classes, config.images, config.seed)
        for model in subjects.models
    ]
    headings = [f"{run.name} ({kind})" for run, _, kind in subjects.trained]
    title = f"Classes of split {config.split!r} that training never saw"
    form: Kind = "svg" if output.endswith(".svg") else "png"
    picture = side_by_side(list(zip(headings, seen, strict=True)), title, config.projection, form)
    write_atomic(output, picture)
    print(f"drawn in {output}")
    results = []
    for model, classes in zip(subjects.models, seen, strict=True):
        ratio = spread_clustering(class_spread(*map(torch.from_numpy, (classes.shown, classes.labels))))
        results.append({"run": model.label, "feature_clustering": ratio, "classes": classes.names})
    return {"picture": output, "results": results, "comparisons": []}
