"""The page of a campaign: what was searched, what was found, what was stopped and why."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from mlflow.entities import Run

from pipeline.charts import campaign as charts
from pipeline.charts.campaign import is_number, last, value_text
from pipeline.pages.facts import Best, Dimension, Finalist, Summary, Trial, checked
from pipeline.pages.inline import inline
from pipeline.pages.leaderboard import parameters, whole_number
from pipeline.pages.reading import Files, name_of
from pipeline.pages.tables import Cell, Column, Table, number, share, table
from pipeline.registry.record import CONFIG

LEDGER, SUMMARY, SPACE, BEST = "ledger.jsonl", "summary.json", "space.yaml", "best.yaml"
MOST_KEYS = 24
STATUS = {"finished": "good", "stopped": "warn", "failed": "bad"}  # classes of the style sheet


def campaign_context(parent: Run, children: Sequence[Run], files: Files) -> dict[str, Any]:
    """What the template shows. Of a campaign that runs there are only its trials so far."""
    run_id = parent.info.run_id
    summary = checked(Summary, files.json(run_id, SUMMARY)) or Summary()
    config, best = (_mapping(files.yaml(run_id, name)) for name in (CONFIG, BEST))
    space = _space(files.yaml(run_id, SPACE) or config.get("space"))
    records = [trial for line in files.json_lines(run_id, LEDGER) if (trial := checked(Trial, line)) is not None]
    ended = bool(records) and parent.info.status == "FINISHED"
    if not records:
        records = [trial for run in children if (trial := _trial(run, space, files)) is not None]
    records.sort(key=lambda trial: (trial.seed is not None, trial.number, trial.seed or 0))
    select = "last" if _mapping(best.get("validation")).get("select") == "last" else "best"
    searched = [trial for trial in records if trial.seed is None]
    counts = Counter(trial.status for trial in records)
    parallel = "Values of every trial and its accuracy, as parallel coordinates"
    return {
        "name": name_of(parent),
        "ended": ended,
        "dataset": parent.data.tags.get("dataset.name", ""),
        "kind": str(parameters(parent).get("campaign") or ""),
        "counts": [(kind, counts[kind]) for kind in ("finished", "stopped", "failed", "running") if counts[kind]],
        "summary": summary,
        "best_values": [(key, value_text(value)) for key, value in summary.best.values.items()] if summary.best else [],
        "best_config": files.text(run_id, BEST),
        "finalists": _finalists(summary.finalists),
        "plots": _plots(space, searched, select, summary.finalists),
        "parallel": inline(charts.parallel_coordinates(space, searched, select, "svg"), parallel)
        if space and searched
        else None,
        "time": inline(charts.trials_over_time(records, select, "svg"), "Trials over time")
        if any(t.began > 0 for t in records)
        else None,
        "lost": _lost(records),
        "trials": _trials(records, space, select, summary.best),
        "space": table(
            "space", "What was searched", space.items(),
            {"key": lambda item: Cell(item[0], code=True), "values": lambda item: _range(item[1])},
        ),
    }  # fmt: skip


def _mapping(content: Any) -> dict[str, Any]:
    return content if isinstance(content, dict) else {}


def _space(content: Any) -> dict[str, Dimension]:
    found = {str(key)[:200]: checked(Dimension, value) for key, value in list(_mapping(content).items())[:MOST_KEYS]}
    return {key: dimension for key, dimension in found.items() if dimension is not None}


def _trial(run: Run, space: dict[str, Dimension], files: Files) -> Trial | None:
    """A trial as its own run tells of it."""
    tags, params = run.data.tags, parameters(run)
    kind = tags.get("trial.kind", "search")
    found = {key: params.get(key, params.get(f"values.{key}")) for key in space}
    return checked(
        Trial,
        {
            "number": whole_number(tags.get("trial.number")),
            "run": name_of(run),
            "values": {key: value for key, value in found.items() if key in params or f"values.{key}" in params},
            "status": tags.get("trial.status", "running"),
            "reason": tags.get("trial.reason", ""),
            "curve": files.metric(run.info.run_id, "val/accuracy"),
            "seed": whole_number(kind.rpartition(" ")[2]) if kind.startswith("finalist") else None,
            "began": (run.info.start_time or 0) / 1000,
            "ended": run.info.end_time / 1000 if run.info.end_time else None,
        },
    )


def _plots(
    space: dict[str, Dimension], searched: Sequence[Trial], select: str, finalists: Sequence[Finalist]
) -> list[dict[str, Any]]:
    """One for every searched number, coloured by the first searched choice that has several values."""
    default = searched[0].values if searched and searched[0].number == 0 else None
    means = [charts.Finalist(f.values, f.accuracy, f.interval) for f in finalists]

    def plot(key: str, mine: Sequence[Trial]) -> dict[str, Any]:
        groups = charts.groups_of(space, mine)
        drawn = charts.accuracy_over(key, space, mine, select, default, means, kind="svg")
        columns = [
            ("trial", lambda t: number(t.number, "d")),
            (last(key), lambda t: number(t.values[key], ".4g")),
            ("group", lambda t: Cell(groups[t.number])),
            ("accuracy, %", lambda t: share(t.score(select))),
            ("status", lambda t: Cell(t.status)),
        ]
        figures = table(f"over-{key}", f"Accuracy over {key}", mine, columns)
        return {"key": key, "plot": inline(drawn, f"Validation accuracy over {key}"), "table": figures}

    numbers = {
        key: [trial for trial in searched if is_number(trial.values.get(key))]
        for key, dimension in space.items()
        if dimension.choices is None
    }
    return [plot(key, mine) for key, mine in numbers.items() if mine]


def _trials(records: Sequence[Trial], space: dict[str, Dimension], select: str, best: Best | None) -> Table:
    def won(trial: Trial) -> bool:
        return best is not None and trial.run == best.run

    def told(trial: Trial) -> Cell:
        who = "best" if won(trial) else ""
        return number(trial.number, "d", note=who if trial.seed is None else f"finalist, seed {trial.seed}")

    def value(key: str, trial: Trial) -> Cell:
        found: Any = trial.values.get(key)
        if is_number(found):
            return number(float(found), ".4g")
        return Cell(value_text(found) if key in trial.values else "")

    keys = [key for key in space if any(key in trial.values for trial in records)]
    columns: list[tuple[str, Column]] = [
        ("trial", told),
        *((last(key), partial(value, key)) for key in keys),
        ("steps", lambda t: number(t.step, ",")),
        ("accuracy, %", lambda t: share(t.score(select), mark="best" if won(t) else "")),
        ("status", lambda t: Cell(t.status, mark=STATUS.get(t.status, ""), note=t.reason)),
    ]
    return table("trials", "All trials", records, columns, filtered=True)


def _lost(records: Sequence[Trial]) -> Table:
    """What was stopped or failed, and why."""
    columns = {
        "trial": lambda t: number(t.number, "d", note="" if t.seed is None else f"seed {t.seed}"),
        "status": lambda t: Cell(t.status, mark=STATUS.get(t.status, "")),
        "at step": lambda t: number(t.step, ","),
        "why": lambda t: Cell(t.reason or "no reason recorded"),
    }
    return table("stopped", "Stopped and failed", [t for t in records if t.status in ("stopped", "failed")], columns)


def _finalists(finalists: Sequence[Finalist]) -> Table:
    columns = {
        "trial": lambda f: number(f.number, "d", note="default" if f.default else ""),
        "accuracy, %": lambda f: share(f.accuracy, f.interval),
        "by seed": lambda f: Cell(" ".join(f"{100 * value:.2f}" for value in f.by_seed)),
        "configuration": lambda f: Cell(" ".join(f"{last(k)}={value_text(v)}" for k, v in f.values.items()), code=True),
    }
    return table("finalists", "Finalists, trained again with other seeds", finalists, columns)


def _range(dimension: Dimension) -> Cell:
    if dimension.low is None or dimension.high is None:
        return Cell("one of " + ", ".join(map(value_text, dimension.choices or [])))
    return Cell(f"{dimension.low:g} to {dimension.high:g}{', logarithmic' if dimension.log else ''}")
