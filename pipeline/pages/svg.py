"""Drawing in SVG: marks have classes, and the page's style sheet gives them colours that suit light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape
from matplotlib.ticker import LogLocator, MaxNLocator

SERIES, SHAPES = 7, 4  # colours of the style sheet, and kinds of markers: 28 different pairs
Point = tuple[float, float]


@dataclass
class Drawing:
    """A picture of so many pixels; the style sheet scales it to its place."""

    width: float
    height: float
    title: str  # for those who do not see it
    parts: list[Markup] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self._add("line", kind, x1=x1, y1=y1, x2=x2, y2=y2)

    def path(self, points: Sequence[Point], kind: str, tip: str = "") -> None:
        """A line through points; of fewer than two nothing is seen."""
        if len(points) > 1:
            self._add("polyline", f"path {kind}", tip, points=" ".join(f"{_n(x)},{_n(y)}" for x, y in points))

    def area(self, points: Sequence[Point], kind: str) -> None:
        if len(points) > 2:
            self._add("polygon", f"area {kind}", points=" ".join(f"{_n(x)},{_n(y)}" for x, y in points))

    def bar(self, x: float, y: float, width: float, height: float, kind: str, tip: str = "") -> None:
        self._add("rect", f"bar {kind}", tip, x=x, y=y, width=max(width, 0.0), height=max(height, 0.0), rx=2)

    def marker(self, x: float, y: float, kind: str, shape: int = 0, tip: str = "", size: float = 4.0) -> None:
        kind = f"mark {kind}"
        r = size
        if shape % SHAPES == 0:
            self._add("circle", kind, tip, cx=x, cy=y, r=r)
        elif shape % SHAPES == 1:
            self._add("rect", kind, tip, x=x - 0.9 * r, y=y - 0.9 * r, width=1.8 * r, height=1.8 * r)
        else:
            corners = [(0.0, -1.25), (1.15, 0.9), (-1.15, 0.9)] if shape % SHAPES == 2 else DIAMOND
            points = " ".join(f"{_n(x + r * dx)},{_n(y + r * dy)}" for dx, dy in corners)
            self._add("polygon", kind, tip, points=points)

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        shown = Markup('<text x="{}" y="{}" class="{}" text-anchor="{}">{}</text>')
        self.parts.append(shown.format(_n(x), _n(y), kind, anchor, text))

    def svg(self) -> Markup:
        head = Markup('<svg viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">')
        shown = head.format(_n(self.width), _n(self.height), _n(self.width), _n(self.height), self.title)
        return shown + Markup("").join(self.parts) + Markup("</svg>")

    def _add(self, name: str, kind: str, tip: str = "", **attributes: float | str) -> None:
        given = Markup(" ").join(
            Markup('{}="{}"').format(key, value if isinstance(value, str) else _n(value))
            for key, value in attributes.items()
        )
        inner = Markup("<title>{}</title>").format(tip) if tip else Markup("")
        shape = Markup('<{0} class="{1}" {2}>{3}</{0}>')
        self.parts.append(shape.format(Markup(name), escape(kind), given, inner))


DIAMOND = [(0.0, -1.35), (1.35, 0.0), (0.0, 1.35), (-1.35, 0.0)]


@dataclass(frozen=True)
class Scale:
    """From figures to pixels; logarithmic where asked."""

    low: float
    high: float
    start: float  # pixel of low
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * ((at - low) / (high - low) if high > low else 0.5)

    def ticks(self, most: int = 5) -> list[float]:
        if not self.high > self.low:
            return [self.low]
        locator = LogLocator(numticks=most + 1) if self.log else MaxNLocator(most, steps=[1, 2, 2.5, 5, 10])
        edge = 1e-9 * abs(self.high - self.low)
        found = [float(v) for v in locator.tick_values(self.low, self.high) if self.low - edge <= v <= self.high + edge]
        return found if len(found) > 1 else [self.low, self.high]


def spread(values: Sequence[float], log: bool = False, margin: float = 0.06) -> tuple[float, float]:
    """Least and greatest of finite values with some room around them; (0, 1) of none."""
    kept = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not kept:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(kept), max(kept)
    if log:
        room = max((high / low) ** margin, 1.1)
        return low / room, high * room
    room = margin * (high - low) or 0.05 * max(abs(high), 1e-9)
    return low - room, high + room


def series(number: int) -> str:
    """The class of a series' colour."""
    return f"s{number % SERIES}"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") if math.isfinite(value) else "0"
