"""The plots of a page that are about accuracies: lines with intervals, rows of figures, points on a plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline.pages.svg import Drawing, Scale, series, spread

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 460.0, 52.0, 14.0, 24.0, 40.0


@dataclass(frozen=True)
class Mark:
    """A figure with its interval, and the published figure beside it."""

    label: str
    value: float
    interval: float | None = None
    paper: float | None = None


@dataclass(frozen=True)
class Line:
    """A series over numbers: (x, y, half-width of the interval or 0)."""

    label: str
    points: Sequence[tuple[float, float, float]]
    paper: Sequence[tuple[float, float]] = ()
    chance: float | None = None


def intervals(marks: Sequence[Mark], title: str) -> Markup:
    """A row a figure, best first; a diamond is the published figure."""
    marks = sorted(marks, key=lambda mark: -mark.value)
    left, step = 150.0, 24.0
    drawing = Drawing(WIDTH, 6.0 + step * len(marks) + BOTTOM, title)
    ends = [m.value + sign * (m.interval or 0.0) for m in marks for sign in (-1, 1)]
    low, high = spread([*ends, *(m.paper for m in marks if m.paper is not None)])
    scale = Scale(max(0.0, low), min(1.0, high), left, WIDTH - RIGHT)
    bottom = 6.0 + step * len(marks)
    _bottom_axis(drawing, scale, bottom, "accuracy", 6.0)
    for row, mark in enumerate(marks):
        y = 6.0 + step * (row + 0.5)
        drawing.text(left - 8, y + 4, short(mark.label, 22), "label", "end")
        half = mark.interval or 0.0
        drawing.line(
            scale(max(scale.low, mark.value - half)), y, scale(min(scale.high, mark.value + half)), y, "whisker s0"
        )
        drawing.marker(scale(mark.value), y, "s0", tip=f"{mark.label}: {percent_text(mark.value, mark.interval)}")
        if mark.paper is not None:
            drawing.marker(
                scale(mark.paper), y, "hollow paper", 3, f"{mark.label}, published: {percent_text(mark.paper)}"
            )
    return drawing.svg()


def by_shot(lines: Sequence[Line], title: str) -> Markup:
    """Accuracy over shots, which stand at equal distances, a line a way; diamonds are published, dots are chance."""
    drawing = Drawing(WIDTH, 270, title)
    shots = sorted({x for line in lines for x, _, _ in line.points})
    place = {shot: LEFT + (WIDTH - LEFT - 96) * (i + 0.5) / len(shots) for i, shot in enumerate(shots)}
    lowest = [line.chance for line in lines if line.chance is not None]
    low, _ = spread([*(y - half for line in lines for _, y, half in line.points), *lowest])
    scale = Scale(max(0.0, low), 1.0, 270 - BOTTOM, TOP)
    left_axis(drawing, scale, LEFT, WIDTH - 96, "accuracy")
    for shot in shots:
        drawing.text(place[shot], 270 - BOTTOM + 16, f"{shot:g}", "tick", "middle")
    drawing.text((LEFT + WIDTH - 96) / 2, 270 - 6, "shots: support images per class", "name", "middle")
    heights = _apart([scale(line.points[-1][1]) for line in lines], 15)
    for number, (line, height) in enumerate(zip(lines, heights, strict=True)):
        kind = series(number)
        if line.chance is not None:
            drawing.line(LEFT, scale(line.chance), WIDTH - 96, scale(line.chance), f"dots {kind}")
        drawing.path([(place[x], scale(y)) for x, y, _ in line.points], kind)
        for x, y, half in line.points:
            drawing.line(
                place[x], scale(max(scale.low, y - half)), place[x], scale(min(1.0, y + half)), f"whisker {kind}"
            )
            drawing.marker(place[x], scale(y), kind, number, f"{line.label} {x:g}-shot: {percent_text(y, half)}")
        for x, y in line.paper:
            if x in place:
                tip = f"{line.label} {x:g}-shot, published: {percent_text(y)}"
                drawing.marker(place[x], scale(y), "hollow paper", 3, tip, 5)
        drawing.text(WIDTH - 92, height + 4, f"{line.label} {100 * line.points[-1][1]:.1f}", f"label {kind}-text")
    return drawing.svg()


def curve(line: Line, loss: Sequence[tuple[float, float]], title: str) -> Markup:
    """Validation accuracy with its interval over the steps, and under it the training loss."""
    upper, gap, lower = 170.0, 34.0, 90.0
    drawing = Drawing(WIDTH, TOP + upper + gap + lower + BOTTOM, title)
    steps = [x for x, _, _ in line.points] + [x for x, _ in loss]
    across = Scale(min(steps, default=0.0), max(steps, default=1.0), LEFT, WIDTH - RIGHT)
    bottom = TOP + upper + gap + lower
    low, high = spread([y + sign * half for _, y, half in line.points for sign in (-1, 1)])
    scale = Scale(max(0.0, low), min(1.0, high), TOP + upper, TOP)
    left_axis(drawing, scale, LEFT, WIDTH - RIGHT, "validation accuracy")
    band = [(across(x), scale(min(scale.high, y + half))) for x, y, half in line.points]
    band += [(across(x), scale(max(scale.low, y - half))) for x, y, half in reversed(line.points)]
    drawing.area(band, "s0")
    drawing.path([(across(x), scale(y)) for x, y, _ in line.points], "s0")
    for x, y, half in line.points:
        drawing.marker(across(x), scale(y), "s0", tip=f"step {x:,.0f}: {percent_text(y, half)}", size=3)
    finite = [(x, y) for x, y in loss if math.isfinite(y)]
    if finite:
        floor, top = spread([y for _, y in finite])
        down = Scale(max(min(floor, 0.0), floor) if floor < 0 else 0.0, top, bottom, bottom - lower)
        left_axis(drawing, down, LEFT, WIDTH - RIGHT, "training loss", percent=False, most=3)
        drawing.path([(across(x), down(y)) for x, y in finite], "s1 thin")
    _bottom_ticks(drawing, across, bottom, "step", [f"{tick:,.0f}" for tick in across.ticks(4)], across.ticks(4))
    return drawing.svg()


def rates(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], title: str) -> Markup:
    """A row a setting, with a mark for each of its shares; the marks' names stand above."""
    left, step, top = 150.0, 26.0, 34.0
    drawing = Drawing(WIDTH, top + step * len(rows) + BOTTOM, title)
    low, high = spread([0.0, *(value for _, values in rows for _, value in values)])
    scale = Scale(0.0, min(1.0, high), left, WIDTH - RIGHT)
    _bottom_axis(drawing, scale, top + step * len(rows), "share", top)
    at = left
    for number, (name, _) in enumerate(rows[0][1] if rows else ()):
        drawing.marker(at + 5, 14, series(number), number)
        drawing.text(at + 14, 18, name, "label")
        at += 26 + 6.4 * len(name)
    for row, (label, values) in enumerate(rows):
        y = top + step * (row + 0.5)
        drawing.text(left - 8, y + 4, short(label, 22), "label", "end")
        for number, (name, value) in enumerate(values):
            drawing.marker(
                scale(min(value, scale.high)), y, series(number), number, f"{label}, {name}: {percent_text(value)}"
            )
    return drawing.svg()


def reliability(bins: Sequence[tuple[float, float, int]], title: str) -> Markup:
    """Stated probability (first) against share of right answers (second), marks by the number of queries (third)."""
    size = 300.0
    drawing = Drawing(WIDTH, size, title)
    across, up = Scale(0.0, 1.0, LEFT, size - RIGHT + 20), Scale(0.0, 1.0, size - BOTTOM, TOP)
    left_axis(drawing, up, LEFT, across.end, "share of right answers")
    ticks = across.ticks()
    _bottom_ticks(drawing, across, size - BOTTOM, "stated probability", [f"{100 * t:.0f} %" for t in ticks], ticks)
    drawing.line(across(0), up(0), across(1), up(1), "dashes")
    total = max(1, sum(count for _, _, count in bins))
    drawing.path([(across(x), up(y)) for x, y, _ in bins], "s0 thin")
    for x, y, count in bins:
        tip = f"{count:,} queries answered with {percent_text(x)} on average: {percent_text(y)} right"
        drawing.marker(across(x), up(y), "s0", 0, tip, 3 + 9 * math.sqrt(count / total))
    drawing.text(across.end + 10, up(1) + 4, "as stated", "tick")
    return drawing.svg()


def plane(
    points: Sequence[tuple[float, float, int]], names: Sequence[str], title: str, axes: tuple[str, str]
) -> Markup:
    """Points with a class each, in equal scales; the names stand at the right, in the order of the classes."""
    size, right = 340.0, 110.0
    drawing = Drawing(WIDTH, size, title)
    inside = WIDTH - 24 - right
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    (x0, x1), (y0, y1) = spread(xs), spread(ys)
    unit = max((x1 - x0) / inside, (y1 - y0) / (size - TOP - 26))
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    drawing.bar(20, TOP - 6, inside + 8, size - TOP - 14, "frame")
    for x, y, member in points:
        px, py = 24 + inside / 2 + (x - cx) / unit, TOP + (size - TOP - 26) / 2 - (y - cy) / unit
        drawing.marker(px, py, f"{series(member)} soft", member, names[member], 3.2)
    for member, name in enumerate(names):
        y = TOP + 8 + member * min(20.0, (size - 60) / max(1, len(names)))
        drawing.marker(WIDTH - right + 14, y, series(member), member)
        drawing.text(WIDTH - right + 24, y + 4, short(name, 13), "label")
    drawing.text(24 + inside / 2, size - 4, axes[0], "name", "middle")
    drawing.parts.append(
        Markup('<text class="name" text-anchor="middle" transform="translate(13 {}) rotate(-90)">{}</text>').format(
            f"{size / 2:.0f}", axes[1]
        )
    )
    return drawing.svg()


def left_axis(
    drawing: Drawing, scale: Scale, left: float, right: float, name: str, percent: bool = True, most: int = 5
) -> None:
    ticks = scale.ticks(most)
    for tick, text in zip(ticks, labels(ticks, percent), strict=True):
        drawing.line(left, scale(tick), right, scale(tick), "grid")
        drawing.text(left - 6, scale(tick) + 4, text, "tick", "end")
    if name:
        drawing.text(2, scale(scale.high) - 11, name, "name")


def _bottom_axis(drawing: Drawing, scale: Scale, y: float, name: str, top: float) -> None:
    ticks = scale.ticks(4)
    for tick in ticks:
        drawing.line(scale(tick), top, scale(tick), y, "grid")
    _bottom_ticks(drawing, scale, y, name, labels(ticks, True), ticks)


def _bottom_ticks(
    drawing: Drawing, scale: Scale, y: float, name: str, texts: Sequence[str], ticks: Sequence[float]
) -> None:
    for tick, text in zip(ticks, texts, strict=True):
        drawing.text(scale(tick), y + 16, text, "tick", "middle")
    drawing.text((scale.start + scale.end) / 2, y + 33, name, "name", "middle")


def labels(ticks: Sequence[float], percent: bool) -> list[str]:
    if not percent:
        return [f"{tick:.3g}" for tick in ticks]
    gap = min((b - a for a, b in zip(ticks, ticks[1:], strict=False)), default=1.0)
    digits = 0 if gap >= 0.00999 else 1 if gap >= 0.000999 else 2
    return [f"{100 * tick:.{digits}f} %" for tick in ticks]


def percent_text(value: float, interval: float | None = None) -> str:
    return f"{100 * value:.2f}" + (f" ± {100 * interval:.2f} %" if interval else " %")


def short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Pixels moved down so that neighbours are at least ``gap`` apart, in their order."""
    placed = list(heights)
    last = -math.inf
    for index in sorted(range(len(placed)), key=lambda i: placed[i]):
        placed[index] = max(placed[index], last + gap)
        last = placed[index]
    return placed
