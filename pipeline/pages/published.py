"""Figures of papers, from a JSON file, and which of them a measurement is to be compared with.

A row has a method and a data set, its setting ("way" and "shot", or a "setting" in words), the accuracy with its
interval where one was published, the source, and perhaps "options": keys of a run's configuration with the value (or
a list of values, or {"above": number}) that the figure was made with. "memory" marks a figure that was written down
from memory, or is quoted by others, and was not compared with the paper; "reruns" are others' results.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import store
from pipeline.config import flat
from pipeline.errors import PipelineError

Row = dict[str, Any]
NEEDED = {"label": str, "method": str, "dataset": str, "accuracy": float, "source": str}


def read_published(path: str) -> list[Row]:
    """The rows of a file.

    Raises:
        PipelineError: it is not there, or not such a file.
    """
    try:
        rows: list[Row] = json.loads(store.read_bytes(path))
    except ValueError as error:
        raise PipelineError(f"{path} is not JSON: {error}") from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        known = isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in NEEDED.items())
        if not known or not ("setting" in row or {"way", "shot"} <= set(row)):
            raise PipelineError(f"{path}, row {number}: needs {', '.join(NEEDED)}, and way and shot or a setting")
    return rows


def protocol(row: Mapping[str, Any]) -> str:
    """How a published figure was measured, in the names of ``jobs.evaluate``."""
    words = str(row.get("setting", ""))
    return "one_shot_runs" if words.endswith("alphabets") else "generalized" if words else "episodic"


def setting(row: Mapping[str, Any]) -> str:
    """What episodes a published or measured figure is of."""
    return str(row["setting"]) if "setting" in row else f"{row['way']}-way {row['shot']}-shot"


def matching(rows: Sequence[Row], method: str, config: Mapping[str, Any]) -> list[Row]:
    """The rows of a run with this method and configuration, on any data set; those with more options last."""
    values = flat(dict(config))

    def fits(row: Row) -> bool:
        return row["method"] == method and all(_meets(values.get(k), v) for k, v in row.get("options", {}).items())

    return sorted(filter(fits, rows), key=lambda row: len(row.get("options", {})))


def by_setting(rows: Sequence[Row], dataset: str) -> dict[str, Row]:
    """The rows of one data set by their setting; of several with the same, the last."""
    return {setting(row): row for row in rows if row["dataset"] == dataset}


def printed(row: Row) -> str:
    """A figure with its interval in percent, with one or two decimals, and ° where it is from memory."""
    spread = f" ± {_percent(row['interval'])}" if "interval" in row else ""
    return f"{_percent(row['accuracy'])}{spread}{'°' if row.get('memory') else ''}"


def _percent(share: float) -> str:
    text = f"{100 * share:.2f}"
    return text[:-1] if text.endswith("0") else text


def _meets(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return isinstance(value, int | float) and value > wanted["above"]
    return value in wanted if isinstance(wanted, list) else value == wanted
