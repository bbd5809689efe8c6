"""The page of a campaign: what was searched, what was found, what was stopped and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mlflow.entities import Run

from pipeline.charts import campaign as charts
from pipeline.charts.campaign import is_number, last, value_text
from pipeline.pages.facts import Best, Dimension, Finalist, Summary, Trial, checked
from pipeline.pages.inline import inline
from pipeline.pages.leaderboard import parameters, whole_number
from pipeline.pages.reading import RUN_TAG, Files
from pipeline.pages.tables import Cell, Table, number, share
from pipeline.registry.record import CONFIG

LEDGER, SUMMARY, SPACE, BEST = "ledger.jsonl", "summary.json", "space.yaml", "best.yaml"
MOST_KEYS = 24
STATUS = {"finished": "good", "stopped": "warn", "failed": "bad"}  # classes of the style sheet


def campaign_name(parent: Run) -> str:
    return str(parent.data.tags.get(RUN_TAG) or parent.info.run_name)


def campaign_context(parent: Run, children: Sequence[Run], files: Files) -> dict[str, Any]:
    """What the template shows. Of a campaign that runs there are only its trials so far."""
    run_id = parent.info.run_id
    params = parameters(parent)
    found = checked(Summary, files.json(run_id, SUMMARY)) or Summary()
    config = files.yaml(run_id, CONFIG)
    space = _space(files.yaml(run_id, SPACE) or (config.get("space") if isinstance(config, dict) else None))
    records = [trial for line in files.json_lines(run_id, LEDGER) if (trial := checked(Trial, line)) is not None]
    ended = bool(records) and parent.info.status == "FINISHED"
    if not records:
        records = [trial for run in children if (trial := _trial(run, space, files)) is not None]
    records.sort(key=lambda trial: (trial.seed is not None, trial.number, trial.seed or 0))
    select = "last" if _selectslast(files, run_id) else "best"
    searched = [trial for trial in records if trial.seed is None]
    default = searched[0] if searched and searched[0].number == 0 else None
    counts = Counter(trial.status for trial in records)
    return {
        "name": campaign_name(parent),
        "ended": ended,
        "dataset": parent.data.tags.get("dataset.name", ""),
        "kind": str(params.get("campaign") or ""),
        "counts": [
            (status, counts[status]) for status in ("finished", "stopped", "failed", "running") if counts[status]
        ],
        "statement": found.statement,
        "best": found.best,
        "best_values": [(key, value_text(value)) for key, value in found.best.values.items()] if found.best else [],
        "best_config": files.text(run_id, BEST),
        "finalists": _finalists(found.finalists),
        "plots": _plots(space, searched, select, default, found.finalists),
        "parallel": inline(
            charts.parallel_coordinates(space, searched, select, "svg"),
            "Values of every trial and its accuracy, as parallel coordinates",
        )
        if space and searched
        else None,
        "time": inline(charts.trials_over_time(records, select, "svg"), "Trials over time")
        if any(t.began > 0 for t in records)
        else None,
        "lost": _lost(records),
        "trials": _trials(records, space, select, found.best),
        "space": _space_table(space),
    }


def best_accuracy(parent: Run) -> tuple[float | None, float | None]:
    """Of a campaign's winner, from its figures."""
    metrics = parent.data.metrics
    return metrics.get("best/accuracy"), metrics.get("best/interval")


def _space(content: Any) -> dict[str, Dimension]:
    if not isinstance(content, dict):
        return {}
    found = {str(key)[:200]: checked(Dimension, value) for key, value in list(content.items())[:MOST_KEYS]}
    return {key: dimension for key, dimension in found.items() if dimension is not None}


def _selectslast(files: Files, run_id: str) -> bool:
    config = files.yaml(run_id, BEST)
    how = config.get("validation") if isinstance(config, dict) else None
    return isinstance(how, dict) and how.get("select") == "last"


def _trial(run: Run, space: dict[str, Dimension], files: Files) -> Trial | None:
    """A trial as its own run tells of it."""
    tags, params = run.data.tags, parameters(run)
    kind = tags.get("trial.kind", "search")
    curve = files.metric(run.info.run_id, "val/accuracy")
    return checked(
        Trial,
        {
            "number": whole_number(tags.get("trial.number")),
            "run": tags.get(RUN_TAG) or run.info.run_name,
            "values": {
                k: params.get(k, params.get(f"values.{k}")) for k in space if k in params or f"values.{k}" in params
            },
            "status": tags.get("trial.status", "running"),
            "reason": tags.get("trial.reason", ""),
            "curve": curve,
            "seed": whole_number(kind.rpartition(" ")[2]) if kind.startswith("finalist") else None,
            "began": (run.info.start_time or 0) / 1000,
            "ended": run.info.end_time / 1000 if run.info.end_time else None,
        },
    )


def _plots(
    space: dict[str, Dimension],
    searched: Sequence[Trial],
    select: str,
    default: Trial | None,
    finalists: Sequence[Finalist],
) -> list[dict[str, Any]]:
    """One for every searched number, coloured by the first searched choice that has several values."""
    out = []
    for key, dimension in space.items():
        mine = [t for t in searched if is_number(t.values.get(key))]
        if dimension.choices is not None or not mine:
            continue
        groups = charts.groups_of(space, mine)
        means = [charts.Finalist(f.values, f.accuracy, f.interval) for f in finalists]
        begun = default.values if default else None
        drawn = charts.accuracy_over(key, space, mine, select, begun, means, kind="svg")
        rows = [
            [
                number(t.number, "d"),
                number(t.values[key], ".4g"),
                Cell(groups[t.number]),
                share(t.score(select)),
                Cell(t.status),
            ]
            for t in mine
        ]
        table = Table(
            ["trial", last(key), "group", "accuracy, %", "status"], rows, f"Accuracy over {key}", name=f"over-{key}"
        )
        out.append({"key": key, "plot": inline(drawn, f"Validation accuracy over {key}"), "table": table})
    return out


def _trials(records: Sequence[Trial], space: dict[str, Dimension], select: str, best: Best | None) -> Table:
    keys = [key for key in space if any(key in trial.values for trial in records)]
    rows = []
    for trial in records:
        who = "" if trial.seed is None else f"finalist, seed {trial.seed}"
        won = best is not None and trial.run == best.run
        rows.append(
            [
                number(trial.number, "d", note=who or ("best" if won else "")),
                *(_value(trial.values[key]) if key in trial.values else Cell() for key in keys),
                number(trial.step, ","),
                share(trial.score(select), mark="best" if won else ""),
                Cell(trial.status, mark=STATUS.get(trial.status, ""), note=trial.reason),
            ]
        )
    return Table(["trial", *map(last, keys), "steps", "accuracy, %", "status"], rows, "All trials", True, "trials")


def _lost(records: Sequence[Trial]) -> Table | None:
    """What was stopped or failed, and why."""
    rows = [
        [
            number(t.number, "d", note="" if t.seed is None else f"seed {t.seed}"),
            Cell(t.status, mark=STATUS.get(t.status, "")), number(t.step, ","),
            Cell(t.reason or "no reason recorded"),
        ]
        for t in records
        if t.status in ("stopped", "failed")
    ]  # fmt: skip
    return Table(["trial", "status", "at step", "why"], rows, "Stopped and failed", name="stopped") if rows else None


def _finalists(finalists: Sequence[Finalist]) -> Table | None:
    if not finalists:
        return None
    rows = [
        [
            number(f.number, "d", note="default" if f.default else ""),
            share(f.accuracy, f.interval),
            Cell(" ".join(f"{100 * value:.2f}" for value in f.by_seed)),
            Cell(" ".join(f"{last(k)}={value_text(v)}" for k, v in f.values.items()), code=True),
        ]
        for f in finalists
    ]
    header = ["trial", "accuracy, %", "by seed", "configuration"]
    return Table(header, rows, "Finalists, trained again with other seeds", name="finalists")


def _space_table(space: dict[str, Dimension]) -> Table:
    rows = []
    for key, d in space.items():
        kind = "one of " + ", ".join(map(value_text, d.choices or []))
        if d.low is not None and d.high is not None:
            kind = f"{d.low:g} to {d.high:g}{', logarithmic' if d.log else ''}"
        rows.append([Cell(key, code=True), Cell(kind)])
    return Table(["key", "values"], rows, "What was searched", name="space")


def _value(value: Any) -> Cell:
    return number(float(value), ".4g") if is_number(value) else Cell(value_text(value))
