"""Every method's published figures beside what was measured here, with the command, the steps and the time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import CONF
from pipeline.report.published import Row, by_setting, matching, protocol, published, setting
from pipeline.tables import markdown_table, text_table

JOINT = {"novel": "novel among all", "all": "all"}  # figures of a joint evaluation that are published too
PROTOCOLS = {  # what the heading of a table says beside the data set
    "episodic": "",
    "generalized": ", new classes among those of training",
    "one_shot_runs": ", Lake's 20 runs",
}
MEMORY = "°"


@dataclass(frozen=True)
class Entry:
    """A method in one form on one data set: published, measured, or both."""

    label: str
    dataset: str
    protocol: str
    published: dict[str, Row] = field(default_factory=dict)  # by setting
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)  # by setting: accuracy and interval
    run: dict[str, Any] | None = None  # the measured file

    def compared(self) -> dict[str, float]:
        """By setting, how far the measured figure is above the published beyond both intervals: below 0, it is not
        reached."""
        return {
            key: row["accuracy"] + row["interval"] + self.published[key].get("interval", 0.0)
            - self.published[key]["accuracy"]
            for key, row in self.measured.items()
            if key in self.published
        }  # fmt: skip


def entries(folder: Path) -> list[Entry]:
    """All methods, with the measured files of a folder."""
    return entries_of(measured_files(folder))


def measured_files(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def entries_of(files: Sequence[dict[str, Any]]) -> list[Entry]:
    """All methods, in the order of ``published.json``; every measured file is an entry of its own."""
    rows = published()
    order: dict[str, int] = {}
    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        order.setdefault(row["label"], len(order))
        groups.setdefault((row["label"], row["dataset"], protocol(row)), {})[setting(row)] = row
    found = []
    for content in files:
        if "method" not in content:  # a comparison of several runs
            continue
        mine = matching(rows, content["method"], content["config"])
        here = [row for row in mine if protocol(row) == content["protocol"]]
        paper = by_setting(here, content["dataset"]["name"])
        label = next(iter([*paper.values(), *here[::-1], *mine[::-1]]), {"label": _form(content)})["label"]
        key = (label, content["dataset"]["name"], content["protocol"])
        groups.pop(key, None)
        found.append(Entry(*key, paper, _measured(content), content))
    found += [Entry(*key, group) for key, group in groups.items()]
    return sorted(found, key=lambda entry: (order.get(entry.label, len(order)), entry.run is None))


def text(found: Sequence[Entry]) -> str:
    """For a terminal: a table a data set, and the commands under them."""
    parts, commands = [], []
    for heading, mine in tables_of(found):
        numbers = []
        for entry in mine:
            if entry.run is not None:
                commands.append(entry.run["command"])
            numbers.append(f"[{len(commands)}]" if entry.run is not None else "")
        parts.append(f"{heading}\n" + _table(mine, "command", numbers, text_table))
    listed = [f"[{number}] {command}" for number, command in enumerate(commands, start=1)]
    return "\n\n".join([*parts, "\n".join(listed), _legend(found)])


def markdown(found: Sequence[Entry]) -> str:
    """For the README: the same, every command in its row."""
    parts = []
    for heading, mine in tables_of(found):
        commands = [f"`{entry.run['command']}`" if entry.run is not None else "" for entry in mine]
        parts.append(f"**{heading}**\n\n" + _table(mine, "trained by", commands, markdown_table))
    return "\n\n".join([*parts, _legend(found)])


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
            }
            for key in settings_of([entry])
        }
        run = {k: entry.run[k] for k in ("command", "evaluation", "steps", "train_seconds")} if entry.run else {}
        what = {"method": entry.label, "dataset": entry.dataset, "protocol": entry.protocol}
        out.append({**what, "figures": figures, **run})
    return out


def _form(content: dict[str, Any]) -> str:
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


def _table(
    mine: Sequence[Entry], last: str, values: list[str], table: Callable[[Sequence[str], Sequence[Any]], str]
) -> str:
    settings = settings_of(mine)
    rows = []
    for number, entry in enumerate(mine):
        run = entry.run or {}
        cells = [_cell(entry.published.get(key), entry.measured.get(key)) for key in settings]
        taken = [steps_text(run), f"{run['train_seconds'] / 60:.0f}"] if run else ["", ""]
        rows.append([entry.label, *cells, *taken, values[number]])
    return table(["method", *settings, "steps", "minutes", last], rows)


def _cell(paper: Row | None, measured: dict[str, Any] | None) -> str:
    """ "published → measured", each with its interval, in percent."""
    text = ""
    if paper is not None:
        spread = f" ± {_as_printed(paper['interval'])}" if "interval" in paper else ""
        text = f"{_as_printed(paper['accuracy'])}{spread}{MEMORY if paper.get('memory') else ''}"
    if measured is not None:
        text += f"{' ' if text else ''}→ {100 * measured['accuracy']:.2f} ± {100 * measured['interval']:.2f}"
    return text


def steps_text(run: dict[str, Any]) -> str:
    """The steps of a run, and those of its recipe where it has others."""
    named = re.search(r"\brecipe=(\w+)", run["command"])
    path = CONF / "recipe" / f"{named[1]}.yaml" if named else None
    whole = yaml.safe_load(path.read_text()).get("steps") if path and path.exists() else None
    return f"{run['steps']:,}" + (f" of {whole:,}" if whole not in (None, run["steps"]) else "")


def _as_printed(share: float) -> str:
    """A published share in percent, with one or two decimals."""
    text = f"{100 * share:.2f}"
    return text[:-1] if text.endswith("0") else text


def _legend(found: Sequence[Entry]) -> str:
    margins = [margin for entry in found for margin in entry.compared().values()]
    reached = sum(margin >= 0 for margin in margins)
    return (
        f"Accuracy in percent with 95 % intervals, published → measured here; {MEMORY} from memory or as others quote "
        f"it. Of {len(margins)} measured figures with a published one, {reached} reach it within the two intervals."
    )


def tables_of(found: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """Headings and entries, a table for each data set and protocol, by how much was measured."""
    groups: dict[str, list[Entry]] = {}
    for entry in found:
        groups.setdefault(entry.dataset + PROTOCOLS[entry.protocol], []).append(entry)
    return sorted(groups.items(), key=lambda item: -sum(entry.run is not None for entry in item[1]))


def settings_of(mine: Sequence[Entry]) -> list[str]:
    """Every setting of some entries, fewer ways and shots first, those in words last."""
    keys = {key for entry in mine for key in (*entry.published, *entry.measured)}

    def order(key: str) -> tuple[int, list[int], str]:
        words = key.split()
        plain = len(words) == 2 and words[0].endswith("-way")
        return (not plain, [int(w.split("-")[0]) for w in words if w.split("-")[0].isdigit()], key)

    return sorted(keys, key=order)
