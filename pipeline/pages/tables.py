"""Tables of a page: cells with what they are sorted by, and the same figures as CSV."""

import base64
import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would compute instead of show


@dataclass(frozen=True)
class Cell:
    """What stands in a table. ``value`` is what it is sorted by; a number puts it to the right."""

    text: str = ""
    value: float | str | None = None
    note: str = ""  # small, under the text
    href: str = ""  # a page of these, never a text of the store
    images: tuple[str, ...] = ()  # data URIs
    code: bool = False
    mark: str = ""  # a class of the style sheet

    @property
    def key(self) -> str:
        if isinstance(self.value, float | int):
            return repr(float(self.value)) if math.isfinite(self.value) else ""
        return self.text if self.value is None else self.value

    @property
    def numeric(self) -> bool:
        return isinstance(self.value, float | int) and not isinstance(self.value, bool)


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    filtered: bool = False  # has a box that leaves the rows with a word
    name: str = "figures"  # of the CSV file
    sticky: bool = False  # the first column stays where the others scroll

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def numeric(self) -> list[bool]:
        """Of every column, whether it holds numbers alone."""
        columns = ([row[number] for row in self.rows] for number in range(len(self.header)))
        filled = ([cell for cell in cells if cell.text or cell.value is not None] for cells in columns)
        return [bool(cells) and all(cell.numeric for cell in cells) for cells in filled]

    @property
    def file(self) -> str:
        """Name of the CSV file: letters, digits and hyphens."""
        return f"{re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')[:60] or 'figures'}.csv"

    @property
    def csv(self) -> str:
        """As a data URI."""
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow([_plain(name) for name in self.header])
        for row in self.rows:
            writer.writerow([_plain(f"{cell.text} ({cell.note})" if cell.note else cell.text) for cell in row])
        return "data:text/csv;charset=utf-8;base64," + base64.b64encode(buffer.getvalue().encode()).decode()


Column = Callable[[Any], Cell]  # of what a row tells of


def table(
    name: str,
    caption: str,
    things: Iterable[Any],
    columns: Mapping[str, Column] | Sequence[tuple[str, Column]],
    filtered: bool = False,
    sticky: bool = False,
) -> Table:
    """A row a thing and a column a function of it, by its heading: in pairs, where two may have the same."""
    pairs = list(columns.items()) if isinstance(columns, Mapping) else columns
    rows = [[cell_of(thing) for _, cell_of in pairs] for thing in things]
    return Table([heading for heading, _ in pairs], rows, caption, filtered, name, sticky)


def number(value: float | None, form: str = ",.4g", note: str = "") -> Cell:
    """A number, or an empty cell."""
    if value is None or not math.isfinite(value):
        return Cell(note=note)
    return Cell(format(value, form), float(value), note=note)


def share(value: float | None, interval: float | None = None, note: str = "", mark: str = "") -> Cell:
    """A share in percent, perhaps with the half-width of its interval."""
    if value is None or not math.isfinite(value):
        return Cell(note=note, mark=mark)
    spread = f" ± {100 * interval:.2f}" if interval is not None and math.isfinite(interval) else ""
    return Cell(f"{100 * value:.2f}{spread}", float(value), note=note, mark=mark)


def _plain(text: str) -> str:
    """A text that a spreadsheet takes as one; a number stays a number."""
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.startswith(_FORMULA) else text
    return text
