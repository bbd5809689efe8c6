"""The reproduction table: every method's published figures beside what is measured, here and in the store."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.pages.facts import Card, checked
from pipeline.pages.leaderboard import Scored, paper_text, parameters
from pipeline.pages.reading import Files
from pipeline.pages.tables import Cell, Table, number, share
from pipeline.report import measured
from pipeline.report.card import CARD
from pipeline.report.reproduction import Entry, entries_of, measured_files, settings_of, steps_text, tables_of
from pipeline.training.runs import REPORT


def reproduction_tables(scored: Sequence[Scored], files: Files, pages: Mapping[str, tuple[str, str]]) -> list[Table]:
    """A table a data set. Of the store's runs of one method in one form, the one with most steps is taken: to choose
    by test accuracy would choose by luck."""
    contents = [*measured_files(measured.FOLDER), *(_content(entry, files) for entry in _longest(scored))]
    return [_table(heading, mine, pages) for heading, mine in tables_of(entries_of(contents))]


def _longest(scored: Sequence[Scored]) -> list[Scored]:
    chosen: dict[tuple[str, str], Scored] = {}
    for entry in scored:
        key = (entry.label, entry.dataset)
        if key not in chosen or _step(entry) > _step(chosen[key]):
            chosen[key] = entry
    return list(chosen.values())


def _step(entry: Scored) -> int:
    steps = parameters(entry.run).get("steps")
    return steps if isinstance(steps, int) else 0


def _content(entry: Scored, files: Files) -> dict[str, Any]:
    """A run of the store in the form of a measured file."""
    card = checked(Card, files.json(entry.run.info.run_id, f"{REPORT}/{CARD}"))
    given = [a for a in card.arguments if not a.startswith("--")] if card else [f"method={entry.method}"]
    return {
        "command": f"python -m jobs.train {shlex.join(given)}",
        "method": entry.method,
        "dataset": {"name": entry.dataset},
        "protocol": "episodic",
        "config": parameters(entry.run),
        "steps": _step(entry),
        "results": [{"model": "trained", **result.model_dump()} for result in entry.results.values()],
        "run_id": entry.run.info.run_id,
        "name": entry.name,
    }


def _table(heading: str, mine: Sequence[Entry], pages: Mapping[str, tuple[str, str]]) -> Table:
    names = settings_of(mine)
    rows = []
    for entry in mine:
        run = entry.run or {}
        version, page = pages.get(str(run.get("run_id", "")), ("", ""))
        where = (
            Cell()
            if not run
            else Cell(version or str(run["name"]), href=page)
            if "run_id" in run
            else Cell("this repository")
        )
        minutes = number(run["train_seconds"] / 60, ",.0f") if "train_seconds" in run else Cell()
        steps = Cell(steps_text(run), float(run["steps"])) if run else Cell()
        cells = [_cell(entry, name) for name in names]
        rows.append([Cell(entry.label), *cells, steps, minutes, where, Cell(run.get("command", ""), code=True)])
    header = ["method", *names, "steps", "minutes", "measured in", "trained by"]
    return Table(header, rows, heading, True, f"reproduction-{heading}", sticky=True)


def _cell(entry: Entry, setting: str) -> Cell:
    paper, found = entry.published.get(setting), entry.measured.get(setting)
    note = f"paper {paper_text(paper)}" if paper else ""
    if found is None:
        return Cell(note=note, value=float(paper["accuracy"]) if paper else None)  # sorted by what there is
    return share(
        found["accuracy"], found["interval"], note=note, mark="good" if entry.compared().get(setting, -1) >= 0 else ""
    )
