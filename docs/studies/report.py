"""What ``jobs.report`` does with the project's own results: tables, published figures beside, pictures."""

from __future__ import annotations

import json
from typing import Any

import torch

from docs.studies import campaigns, reproduction, results
from docs.studies.embeddings import embed_classes, side_by_side
from pipeline import store
from pipeline.charts.style import Kind
from pipeline.config import Config, validate
from pipeline.errors import PipelineError
from pipeline.functional.clustering import class_spread, spread_clustering
from pipeline.pages.report import ReportConfig, Subjects


def report(raw: Config) -> dict[str, Any]:
    """Make the report ``what``; with ``record`` its figures are written as JSON too."""
    if raw["what"] == "readme":
        print("what=readme is called results now")
        raw = {**raw, "what": "results"}
    config = validate(ReportConfig, raw)
    return {
        "results": _results,
        "reproduction": _reproduction,
        "campaign": _campaign,
        "embeddings": _embeddings,
    }[config.what](config)


def _results(_: ReportConfig) -> dict[str, Any]:
    changed = results.write_pages()
    for path in changed:
        print(f"{path.name} is made anew")
    return {"changed": [path.name for path in changed]}


def _reproduction(config: ReportConfig) -> dict[str, Any]:
    entries = reproduction.entries(results.FOLDER)
    print(reproduction.text(entries))
    found = {"methods": reproduction.summary(entries)}
    if config.record:
        store.write_bytes(config.record, (json.dumps(found, indent=1) + "\n").encode())
        print(f"recorded in {config.record}")
    return found


def _campaign(config: ReportConfig) -> dict[str, Any]:
    if len(config.runs) != 1 or config.record is None:
        raise PipelineError("campaign needs runs=[NAME], a campaign's name, and record=FILE for what it found")
    found = campaigns.record_campaign(config.record, config.runs[0], config.storage)
    print(f"{found['statement']}\nrecorded in {config.record}", flush=True)
    return found


def _embeddings(config: ReportConfig) -> dict[str, Any]:
    output = config.output or "embeddings.png"
    if not output.endswith((".png", ".svg")):
        raise PipelineError(f"output={output}: a picture is a .png or an .svg")
    store.check_output(output, "output")
    subjects = Subjects(config)
    seen = [
        embed_classes(model, subjects.dataset, config.split, config.classes, config.images, config.seed)
        for model in subjects.models
    ]
    headings = [f"{run.name} ({kind})" for run, _, kind in subjects.trained]
    title = f"Classes of split {config.split!r} that training never saw"
    form: Kind = "svg" if output.endswith(".svg") else "png"
    store.write_bytes(output, side_by_side(list(zip(headings, seen, strict=True)), title, config.projection, form))
    print(f"drawn in {output}")
    figures = []
    for model, classes in zip(subjects.models, seen, strict=True):
        ratio = spread_clustering(class_spread(*map(torch.from_numpy, (classes.shown, classes.labels))))
        figures.append({"run": model.label, "feature_clustering": ratio, "classes": classes.names})
    found = {"picture": output, "results": figures, "comparisons": []}
    subjects.record(config, found)
    return {"runs": subjects.described(), **found}
