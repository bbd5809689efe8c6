"""The leaderboard: every evaluated run by data set, split, way and shot, with the published figure where a paper has
one."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import yaml
from markupsafe import Markup
from mlflow.entities import Run

from pipeline.charts.accuracy import Mark, accuracies
from pipeline.pages.facts import Result, checked
from pipeline.pages.inline import inline
from pipeline.pages.published import Row, by_setting, matching, printed, protocol
from pipeline.pages.reading import Files, Site, name_of
from pipeline.pages.tables import Cell, Table, number, share, table
from pipeline.registry.record import CHANGED
from pipeline.renamed import RENAMED
from pipeline.training.runs import EVALUATION, REPORT
from pipeline.weights import origin

MOST_MARKS = 14  # rows of a plot; the table has all


@dataclass(frozen=True)
class Scored:
    """A run with its accuracies on a split."""

    run: Run
    label: str  # of the method: as published, or its name
    method: str
    dataset: str
    results: dict[str, Result]  # by setting
    paper: dict[str, Row]  # by setting
    split: str = "test"

    @property
    def fingerprint(self) -> str:
        return str(self.run.data.tags.get("dataset.fingerprint", ""))


def results_of(files: Files, run: Run) -> list[Result]:
    """The figures of a run's evaluation; those that are none are left out."""
    content = files.json(run.info.run_id, f"{REPORT}/{EVALUATION}")
    found = [checked(Result, entry) for entry in content] if isinstance(content, list) else []
    return [result for result in found if result is not None]


def parameters(run: Run) -> dict[str, Any]:
    """A run's configuration of now by dotted keys, as far as short texts tell."""
    changed = {key.removeprefix(CHANGED): text for key, text in run.data.tags.items() if key.startswith(CHANGED)}
    return {RENAMED.get(key, key): _value(text) for key, text in {**run.data.params, **changed}.items()}


def paper_rows(papers: Sequence[Row], params: Mapping[str, Any], dataset: str) -> tuple[str | None, dict[str, Row]]:
    """The method's published name, and its published figures on a data set by setting."""
    rows = [row for row in papers if protocol(row) == "episodic"]
    mine = matching(rows, str(params.get("method.name", "")), params)
    here = by_setting(mine, dataset)
    label = next(iter([*here.values(), *mine[::-1]]), {"label": None})["label"]
    return label, here


def scored_runs(site: Site, papers: Sequence[Row]) -> list[Scored]:
    found = []
    for run in site.runs:
        results = results_of(site.files, run)
        if results:
            params = parameters(run)
            method = str(params.get("method.name", "unknown method"))
            dataset = run.data.tags.get("dataset.name") or "unknown data set"
            label, paper = paper_rows(papers, params, dataset)
            for split in dict.fromkeys(result.split for result in results):
                named = {result.setting: result for result in results if result.split == split}
                found.append(Scored(run, label or method, method, dataset, named, paper, split))
    return found


@dataclass(frozen=True)
class Board:
    """The part of one split of one version of a data set: figures on other classes are not comparable."""

    dataset: str
    table: Table
    plots: list[tuple[str, Markup]]


def boards(scored: Sequence[Scored], pages: Mapping[str, tuple[str, str]]) -> list[Board]:
    """A part for each split of each version of a data set, the one with most runs first.

    Args:
        pages: of run ids, the registered version's name and the file of its page.
    """
    groups: dict[tuple[str, str, str], list[Scored]] = {}
    for entry in scored:
        groups.setdefault((entry.dataset, entry.fingerprint, entry.split), []).append(entry)
    versions = Counter(dataset for dataset, _ in {(dataset, fingerprint) for dataset, fingerprint, _ in groups})
    found = []
    for (dataset, fingerprint, split), mine in sorted(groups.items(), key=lambda item: -len(item[1])):
        name = dataset if versions[dataset] == 1 else f"{dataset}, {fingerprint[:12] or 'no fingerprint'}"
        found.append(_board(name if split == "test" else f"{name}, split {split}", split, mine, pages))
    return found


def _board(dataset: str, split: str, mine: Sequence[Scored], pages: Mapping[str, tuple[str, str]]) -> Board:
    settings = sorted(
        {s for entry in mine for s in entry.results}, key=lambda s: [int(w.split("-")[0]) for w in s.split()]
    )
    best = {s: max(e.results[s].accuracy for e in mine if s in e.results) for s in settings}

    def accuracy(setting: str, entry: Scored) -> Cell:
        result, paper = entry.results.get(setting), entry.paper.get(setting)
        note = f"paper {printed(paper)}" if paper is not None else ""
        if result is None:
            return Cell(note=note)
        mark = "best" if result.accuracy == best[setting] else ""
        return share(result.accuracy, result.interval, note=note, mark=mark)

    def registered(entry: Scored) -> Cell:
        version, page = pages.get(entry.run.info.run_id, ("", ""))
        return Cell(version or "not registered", version or "~", href=page)

    board = table(
        f"leaderboard-{dataset}",
        f"Accuracy on the {split} classes of {dataset}, in percent ± 95 % interval",
        sorted(mine, key=lambda e: [-e.results[s].accuracy if s in e.results else 1.0 for s in settings]),
        {
            "method": lambda e: Cell(e.label, note="" if e.label == e.method else e.method),
            **{setting: partial(accuracy, setting) for setting in settings},
            "backbone": lambda e: _backbone(parameters(e.run), e.run.data.tags.get("backbone.weights", "")),
            "steps": lambda e: number(whole_number(str(parameters(e.run).get("steps"))), ","),
            "model": registered,
            "run": lambda e: Cell(name_of(e.run), code=True),
        },
        filtered=True,
        sticky=True,
    )
    return Board(dataset, board, [(setting, _plot(dataset, setting, mine)) for setting in settings])


def _backbone(params: Mapping[str, Any], weights: str) -> Cell:
    """The network, and what its first weights were trained on: as the run says, or those of its features' network."""
    own = {key.removeprefix("backbone."): value for key, value in params.items() if key.startswith("backbone.")}
    names = [str(own[key]) for key in ("name", "model") if own.get(key) is not None]
    return Cell(" ".join(names), note=origin(own) or weights)


def _plot(dataset: str, setting: str, mine: Sequence[Scored]) -> Markup:
    """The best run of every method."""
    chosen: dict[str, Mark] = {}
    for entry in sorted((e for e in mine if setting in e.results), key=lambda e: -e.results[setting].accuracy):
        result, paper = entry.results[setting], entry.paper.get(setting)
        published = None if paper is None else float(paper["accuracy"])
        chosen.setdefault(entry.label, Mark(entry.label, result.accuracy, result.interval, published))
    return inline(accuracies(list(chosen.values())[:MOST_MARKS], "svg"), f"Accuracy on {dataset}, {setting}")


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text) if len(text) < 200 and not text.startswith(("&", "*", "!")) else text
    except (ValueError, yaml.YAMLError):
        return text


def whole_number(text: str | None) -> int | None:
    """Of somebody's text; None where it is none."""
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 16 else None
