"""Published figures: ``published.json``, and which of them a measurement is to be compared with.

A row has a method and a data set, its setting ("way" and "shot", or a "setting" in words), the accuracy with its
interval where one was published, the source, and perhaps "options": keys of a run's configuration with the value (or
a list of values, or {"above": number}) that the figure was made with. "memory" marks a figure that was written down
from memory, or is quoted by others, and was not compared with the paper; "reruns" are others' results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import flat

PUBLISHED = Path(__file__).parent / "published.json"
Row = dict[str, Any]


def published() -> list[Row]:
    rows: list[Row] = json.loads(PUBLISHED.read_text())
    return rows


def protocol(row: Mapping[str, Any]) -> str:
    """How a published figure was measured, in the names of ``jobs.evaluate``."""
    words = str(row.get("setting", ""))
    return "one_shot_runs" if words.endswith("alphabets") else "generalized" if words else "episodic"


def setting(row: Mapping[str, Any]) -> str:
    """What episodes a published or measured figure is of."""
    return str(row["setting"]) if "setting" in row else f"{row['way']}-way {row['shot']}-shot"


def matching(rows: list[Row], method: str, config: Mapping[str, Any]) -> list[Row]:
    """The rows of a run with this method and configuration, on any data set; those with more options last."""
    values = flat(dict(config))

    def fits(row: Row) -> bool:
        return row["method"] == method and all(_meets(values.get(k), v) for k, v in row.get("options", {}).items())

    return sorted(filter(fits, rows), key=lambda row: len(row.get("options", {})))


def by_setting(rows: list[Row], dataset: str) -> dict[str, Row]:
    """The rows of one data set by their setting; of several with the same, the last."""
    return {setting(row): row for row in rows if row["dataset"] == dataset}


def _meets(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return isinstance(value, int | float) and value > wanted["above"]
    return value in wanted if isinstance(wanted, list) else value == wanted
