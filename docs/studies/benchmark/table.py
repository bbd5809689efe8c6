"""The benchmark's table, for a terminal and for a page."""

from __future__ import annotations

from typing import Any

from pipeline.tables import markdown_table, text_table

HEADER = ["what", "measured", "spread", "target", "of"]


def text(content: dict[str, Any]) -> str:
    """For a terminal: the table, and what was not run."""
    table = text_table(HEADER, [_cells(r) for r in content["rows"] if "median" in r])
    return "\n".join([table, *(f"not run: {r['what']} ({r['not_run']})" for r in content["rows"] if "not_run" in r)])


def markdown(content: dict[str, Any]) -> str:
    """For a README: the table, what was not run, the machine and the command."""
    about = content["machine"]
    lines = [markdown_table(HEADER, [_cells(r) for r in content["rows"] if "median" in r])]
    left_out = [f"{r['what'].rstrip('.')} ({r['not_run']})" for r in content["rows"] if "not_run" in r]
    if left_out:
        lines.append(f"Not run: {'; '.join(left_out)}.")
    place = ", ".join(filter(None, [f"{about['cores']} cores", about["processor"], about["gpu"]]))
    lines.append(f"`{content['command']}`, {place}, torch {about['torch']}; medians, and the lowest and highest ratio.")
    return "\n\n".join(lines)


def line(summary: dict[str, Any]) -> str:
    """One row while the others are still to come."""
    if "not_run" in summary:
        return f"not run: {summary['not_run']}"
    what, measured, spread, target, sides = _cells(summary)
    return f"{measured} ({spread})  target {target or 'none'}  {what}: {sides}"


def _cells(summary: dict[str, Any]) -> list[str]:
    unit = summary["unit"]
    spread = f"{_number(summary['low'])} – {_number(summary['high'])}"
    of = ", ".join(f"{name} {_number(value)}" for name, value in summary["sides"].items())
    return [
        summary["what"],
        _number(summary["median"]) + _suffix(unit),
        spread,
        _target(summary["target"], unit) + (", missed" if summary["met"] is False else ""),
        "; ".join(filter(None, [f"{of} {summary['measure']}".strip(), summary["note"]])),
    ]


def _target(target: dict[str, float | None], unit: str) -> str:
    for sign, value in (("≥", target["least"]), ("≤", target["most"])):
        if value is not None:
            return f"{sign} {value:g}{_suffix(unit)}"
    return ""


def _suffix(unit: str) -> str:
    return "×" if unit == "x" else f" {unit}"


def _number(value: float) -> str:
    """Three digits, and no exponent."""
    if value and abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
