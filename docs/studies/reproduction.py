"""Every method's published figures beside what was measured here, with the steps, the time and the command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import CONF
from pipeline.pages.published import Row, by_setting, matching, printed, protocol, read_published, setting
from pipeline.tables import markdown_table, text_table

PUBLISHED = Path(__file__).with_name("published.json")
JOINT = {"novel": "novel among all", "all": "all"}  # figures of a joint evaluation that are published too
PROTOCOLS = {  # what the heading of a table says beside the dataset
    "episodic": "",
    "generalized": ", new classes among those of training",
    "one_shot_runs": ", Lake's 20 runs",
}
HEADER = ["method", "episodes", "published, %", "measured, %", "interval", "steps", "core-minutes", "reached"]
Table = Callable[[Sequence[str], Sequence[Sequence[object]]], str]


@dataclass(frozen=True)
class Entry:
    """A method in one form on one dataset: published, measured, or both."""

    label: str
    dataset: str
    protocol: str
    published: dict[str, Row] = field(default_factory=dict)  # by setting
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)  # by setting: accuracy and interval
    run: dict[str, Any] | None = None  # the measured file

    def reached(self, setting: str) -> bool | None:
        """Whether the measured figure reaches the published one within both intervals; None: one of them is missing."""
        row, paper = self.measured.get(setting), self.published.get(setting)
        if row is None or paper is None:
            return None
        reach: float = row["accuracy"] + row["interval"] + paper.get("interval", 0.0)
        return reach >= paper["accuracy"]


def published() -> list[Row]:
    return read_published(str(PUBLISHED))


def entries(folder: Path) -> list[Entry]:
    """All methods, in the order of ``published.json``; every measured file of the folder is an entry of its own."""
    rows = published()
    order: dict[str, int] = {}
    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        order.setdefault(row["label"], len(order))
        groups.setdefault((row["label"], row["dataset"], protocol(row)), {})[setting(row)] = row
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if "method" not in content:  # a comparison of several runs
            continue
        mine = matching(rows, content["method"], content["config"])
        here = [row for row in mine if protocol(row) == content["protocol"]]
        paper = by_setting(here, content["dataset"]["name"])
        label = next(iter([*paper.values(), *here[::-1], *mine[::-1]]), {"label": form(content)})["label"]
        key = (label, content["dataset"]["name"], content["protocol"])
        groups.pop(key, None)
        found.append(Entry(*key, paper, _measured(content), content))
    found += [Entry(*key, group) for key, group in groups.items()]
    return sorted(found, key=lambda entry: (order.get(entry.label, len(order)), entry.run is None))


def text(found: Sequence[Entry]) -> str:
    """For a terminal: two tables for each dataset, and how many figures are reached."""
    parts = [f"{heading}\n{part}" for heading, mine in groups_of(found) for part in _tables(mine, text_table)]
    return "\n\n".join([*parts, legend(found)])


def markdown(found: Sequence[Entry]) -> str:
    """For a page: the same."""
    parts = []
    for heading, mine in groups_of(found):
        parts += [f"**{heading}**", *_tables(mine, markdown_table)]
    return "\n\n".join([*parts, legend(found)])


def finished(found: Sequence[Entry]) -> str:
    """For the README: the figures that reach the published ones."""
    rows = [
        [row[0], entry.dataset + PROTOCOLS[entry.protocol], *row[1:-1]]
        for entry in found
        for row in _rows(entry)
        if row[-1] == "yes"
    ]
    return markdown_table([HEADER[0], "dataset", *HEADER[1:-1]], rows)


def summary(found: Sequence[Entry]) -> list[dict[str, Any]]:
    """The same as plain data."""
    out = []
    for entry in found:
        figures = {
            key: {
                "published": entry.published.get(key, {}).get("accuracy"),
                "source": entry.published.get(key, {}).get("source"),
                "measured": entry.measured.get(key, {}).get("accuracy"),
                "interval": entry.measured.get(key, {}).get("interval"),
                "reached": entry.reached(key),
            }
            for key in settings_of(entry)
        }
        run = {k: entry.run[k] for k in ("command", "evaluation", "steps", "train_seconds")} if entry.run else {}
        what = {"method": entry.label, "dataset": entry.dataset, "protocol": entry.protocol}
        out.append({**what, "figures": figures, **run})
    return out


def legend(found: Sequence[Entry]) -> str:
    verdicts = [entry.reached(key) for entry in found for key in entry.measured]
    compared = [verdict for verdict in verdicts if verdict is not None]
    return (
        f"95 % intervals; ° from memory or as others quote it. Of {len(compared)} measured figures with a "
        f"published one, {sum(compared)} reach it within both intervals."
    )


def groups_of(found: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """Headings and entries, a group for each dataset and protocol, by how much was measured."""
    groups: dict[str, list[Entry]] = {}
    for entry in found:
        groups.setdefault(entry.dataset + PROTOCOLS[entry.protocol], []).append(entry)
    return sorted(groups.items(), key=lambda item: -sum(entry.run is not None for entry in item[1]))


def settings_of(entry: Entry) -> list[str]:
    """Every setting that has a figure."""
    return _in_order({*entry.published, *entry.measured})


def _in_order(settings: Iterable[str]) -> list[str]:
    """Fewer ways and shots first, those in words last."""

    def order(key: str) -> tuple[int, list[int], str]:
        words = key.split()
        plain = len(words) == 2 and words[0].endswith("-way")
        return (not plain, [int(w.split("-")[0]) for w in words if w.split("-")[0].isdigit()], key)

    return sorted(settings, key=order)


def _tables(mine: Sequence[Entry], table: Table) -> list[str]:
    """What was measured, a row a figure with the commands under it; then what was not, a row a method."""
    ran = [entry for entry in mine if entry.run is not None]
    missing: dict[str, dict[str, Row]] = {}
    for entry in mine:
        done = {key for other in ran if other.label == entry.label for key in other.measured}
        missing.setdefault(entry.label, {}).update({k: row for k, row in entry.published.items() if k not in done})
    missing = {label: rows for label, rows in missing.items() if rows}
    parts = []
    if ran:
        parts.append(table(HEADER, [row for entry in ran for row in _rows(entry)]))
        parts.append("\n".join(f"- {entry.label}: {_made(entry.run)}" for entry in ran if entry.run))
    if missing:
        settings = _in_order({key for rows in missing.values() for key in rows})
        rows = [[label, *(_printed(found.get(key)) for key in settings)] for label, found in missing.items()]
        parts.append(table(["published, not measured here", *settings], rows))
    return parts


def _rows(entry: Entry) -> list[list[str]]:
    """Of what was measured, the cells of :data:`HEADER`."""
    run = entry.run or {}
    verdict = {None: "", True: "yes", False: "no"}
    return [
        [
            entry.label,
            key,
            _printed(entry.published.get(key)),
            f"{100 * entry.measured[key]['accuracy']:.2f}",
            f"± {100 * entry.measured[key]['interval']:.2f}",
            steps_text(run),
            f"{_core_minutes(run):,.0f}",
            verdict[entry.reached(key)],
        ]
        for key in settings_of(entry)
        if key in entry.measured
    ]


def _core_minutes(run: dict[str, Any]) -> float:
    """Of training, and of that of the weights it began with: wall-clock minutes times the cores of all workers."""
    return sum(float(one["train_seconds"]) / 60 * _cores(one) for one in [run, *_befores(run)])


def _cores(run: dict[str, Any]) -> float:
    cluster = run["config"].get("cluster", {})
    return float(cluster.get("workers", 1) * cluster.get("cpus_per_worker", run["machine"]["cores"]))


def _made(run: dict[str, Any]) -> str:
    machine = run["machine"]
    about = [f"seed {run['seed']}", machine.get("processor"), machine.get("vectors"), run.get("code")]
    begun = "".join(f", begun with the weights of `{before['command']}`" for before in _befores(run))
    return f"`{run['command']}`{begun} ({', '.join(filter(None, about))})"


def _befores(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs whose weights it began with, and they in turn: the latest first."""
    return [run["initial"], *_befores(run["initial"])] if "initial" in run else []


def form(content: dict[str, Any]) -> str:
    """A method that has no published row: its name, and its options on the command line."""
    return ", ".join([content["method"], *re.findall(r"\bmethod\.(\S+)", content["command"])])


def _measured(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By setting, the accuracies of the trained model."""
    found: dict[str, dict[str, Any]] = {}
    for result in content["results"]:
        if result["model"] != "trained":
            continue
        if content["protocol"] == "generalized":
            if result["fine_tuning"] is None:
                found |= {f"{result['shot']}-shot {name}": result[key] for key, name in JOINT.items()}
        elif content["protocol"] == "one_shot_runs":
            found[f"{setting(result)} within alphabets"] = result
        else:
            found[setting(result)] = result
    return found


def _printed(row: Row | None) -> str:
    return "" if row is None else printed(row)


def steps_text(run: dict[str, Any]) -> str:
    """The steps of a run, after those of the weights it began with, and those of its recipe where these are more."""
    named = re.search(r"\brecipe=(\w+)", run["command"])
    path = CONF / "recipe" / f"{named[1]}.yaml" if named else None
    whole = yaml.safe_load(path.read_text()).get("steps") if path and path.exists() else None
    begun = "".join(f"{before['steps']:,} + " for before in reversed(_befores(run)))
    return f"{begun}{run['steps']:,}" + (f" of {whole:,}" if (whole or 0) > run["steps"] else "")
