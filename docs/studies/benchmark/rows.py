"""The rows of the benchmark's table: small functions that register themselves by name and find ratios."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.training.config import Cluster

Times = dict[str, list[float]]  # of every side, one figure a repetition


class NotHere(Exception):
    """A row that cannot be measured on this machine, and why."""


@dataclass(frozen=True)
class Bench:
    """What a row is told."""

    repetitions: int
    scale: float  # of the work in a repetition
    folder: Path  # for datasets and runs that are made to be measured
    cluster: Cluster
    images: str | None = None  # PNGs to ingest
    device: str = "cuda"  # of the rows for a GPU

    def count(self, number: int, least: int = 1) -> int:
        """``number`` of steps or episodes, at this scale."""
        return max(least, round(number * self.scale))


@dataclass(frozen=True)
class Finding:
    """One line of the table: a figure for every repetition, with what it was made of."""

    what: str
    values: Sequence[float]
    unit: str  # "x", "%", "s", "MB"
    least: float | None = None  # the target: at least, or
    most: float | None = None  # at most
    sides: Times | None = None
    measure: str = ""  # what the sides are counted in
    note: str = ""

    def summary(self) -> dict[str, Any]:
        """Plain values, for a table and for JSON."""
        median = statistics.median(self.values)
        met = (self.least is None or median >= self.least) and (self.most is None or median <= self.most)
        return {
            "what": self.what,
            "median": median,
            "low": min(self.values),
            "high": max(self.values),
            "unit": self.unit,
            "target": {"least": self.least, "most": self.most},
            "met": met if self.least is not None or self.most is not None else None,
            "sides": {name: statistics.median(values) for name, values in (self.sides or {}).items()},
            "measure": self.measure,
            "note": self.note,
            "values": list(self.values),
        }


Measure = Callable[[Bench], Iterable[Finding]]


@dataclass(frozen=True)
class Row:
    theme: str
    name: str
    measure: Measure
    needs_ray: bool


ROWS: dict[str, Row] = {}


def row(theme: str, needs_ray: bool = False) -> Callable[[Measure], Measure]:
    """Register a function as a row, by its own name, of a theme."""

    def register(measure: Measure) -> Measure:
        name = measure.__name__
        ROWS[name] = Row(theme, name, measure, needs_ray)
        return measure

    return register


def select(what: str) -> list[Row]:
    """The rows of "all", of a theme or of a name, in the order in which they were registered.

    Raises:
        PipelineError: there are none.
    """
    chosen = [r for r in ROWS.values() if what in ("all", r.theme, r.name)]
    if not chosen:
        themes = ", ".join(dict.fromkeys(r.theme for r in ROWS.values()))
        raise PipelineError(f"what={what!r}: choose all, a theme ({themes}) or a row ({', '.join(ROWS)})")
    return chosen


def ratio(
    what: str,
    sides: Times,
    over: tuple[str, str],
    measure: str,
    least: float | None = None,
    most: float | None = None,
    note: str = "",
) -> Finding:
    """The ratio of two sides, repetition by repetition."""
    first, second = over
    values = [a / b for a, b in zip(sides[first], sides[second], strict=True)]
    return Finding(what, values, "x", least, most, sides, measure, note)


def measured(row: Row, bench: Bench) -> Iterator[dict[str, Any]]:
    """The summaries of a row; of one that cannot be measured here, the reason."""
    about = {"theme": row.theme, "row": row.name}
    try:
        for finding in row.measure(bench):
            yield {**about, **finding.summary()}
    except NotHere as reason:
        yield {**about, "what": (row.measure.__doc__ or row.name).strip().splitlines()[0], "not_run": str(reason)}
