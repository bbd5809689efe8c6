"""Tables for a terminal and for Markdown."""

import unicodedata
from collections.abc import Sequence


def printable(text: str) -> str:
    """Text as a line of a terminal shows it: a line break or a terminal's command, which a file's name may hold, as
    Python writes it."""
    return "".join(letter if unicodedata.category(letter) != "Cc" else ascii(letter)[1:-1] for letter in text)


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned with spaces; numbers to the right."""
    cells = [[printable(str(cell)) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    numeric = [all(_is_number(row[column]) for row in cells[1:]) for column in range(len(header))]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def percent(mean: float, interval: float | None = None) -> str:
    return f"{100 * mean:.2f}" if interval is None else f"{100 * mean:.2f} ± {100 * interval:.2f}"


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "-+"
