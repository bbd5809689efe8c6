"""Charts of accuracies and other shares: over steps, over shots, a row a method, and against stated probabilities."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pipeline.charts.style import (
    BACK,
    FAINT,
    INK,
    PALETTE,
    PAPER,
    WIDTH,
    Kind,
    apart,
    chart,
    dot,
    limits,
    look,
    percent_axis,
    percent_text,
    render,
    short,
)  # fmt: skip

MOST_POINTS = 300  # of a loss


@dataclass(frozen=True)
class Mark:
    """A figure with its interval, and the published figure beside it."""

    label: str
    value: float
    interval: float | None = None
    paper: float | None = None


@dataclass(frozen=True)
class Line:
    """Accuracies of one way: (shots, accuracy, half-width of the interval), and published ones (shots, accuracy)."""

    way: int
    points: Sequence[tuple[int, float, float]]
    papers: Sequence[tuple[int, float]] = ()


def lines_of(results: Iterable[Mapping[str, Any]], papers: Iterable[Mapping[str, Any]] = ()) -> list[Line]:
    """From entries with "way", "shot", "accuracy" and "interval", a line a way; ``papers`` are published rows."""
    results, papers = list(results), list(papers)
    return [
        Line(
            way,
            sorted((int(r["shot"]), float(r["accuracy"]), float(r["interval"])) for r in results if r["way"] == way),
            [(int(row["shot"]), float(row["accuracy"])) for row in papers if row.get("way") == way],
        )
        for way in sorted({int(r["way"]) for r in results})
    ]


def learning_curve(
    accuracy: Sequence[tuple[float, float, float]],
    loss: Sequence[tuple[float, float]],
    title: str = "",
    kind: Kind = "png",
) -> bytes:
    """Validation accuracy (step, value, half-width of its 95 % interval), and under it the training loss (step, value),
    each point the mean of neighbours where there are many."""
    points = [(x, y, half if math.isfinite(half) else 0.0) for x, y, half in accuracy if math.isfinite(y)]
    losses = _thin([(x, y) for x, y in loss if math.isfinite(y)])
    with chart(WIDTH, 3.7) as drawn:
        above, below = drawn.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        above.set(title=title, ylabel="validation accuracy")
        percent_axis(above)
        if points:
            steps, values, halves = zip(*points, strict=True)
            above.plot(steps, values, color=PALETTE[0])
            edges = [[y + sign * half for y, half in zip(values, halves, strict=True)] for sign in (-1, 1)]
            above.set_ylim(limits([*edges[0], *edges[1]]))
            above.fill_between(steps, edges[0], edges[1], color=PALETTE[0], alpha=0.18, linewidth=0)
            for x, y, half in points:
                dot(above, x, y, f"step {x:,.0f}: {percent_text(y, half)}")
            x, y, half = max(points, key=lambda point: point[1])
            above.plot(x, y, marker="o", markersize=10, markerfacecolor="none", color=PALETTE[0])
            above.set_title(f"best {percent_text(y, half)} at step {x:,.0f}", loc="right", color=PALETTE[0], fontsize=9,
                            weight="normal")  # fmt: skip
        else:
            above.text(0.5, 0.5, "no validation yet", transform=above.transAxes, ha="center", color=FAINT)
        below.set_ylabel("training loss")
        if losses:
            below.plot(*zip(*losses, strict=True), color=PALETTE[1], linewidth=1.2)
            low, high = min(y for _, y in losses), max(y for _, y in losses)
            if low > 0 and high > 30 * low:
                below.set_yscale("log")
            else:
                below.set_ylim(bottom=min(0.0, low))
                below.yaxis.set_major_locator(MaxNLocator(3))
            below.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        below.xaxis.set_major_locator(MaxNLocator(5))
        below.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        below.set_xlabel("step")
        return render(drawn, kind)


def accuracy_by_shot(lines: Sequence[Line], title: str = "", kind: Kind = "png") -> bytes:
    """Accuracy over the number of shots, which stand at equal distances, a line a way, with 95 % intervals; diamonds
    are published figures, dotted is chance."""
    shots = sorted({shot for line in lines for shot, _, _ in line.points})
    place = {shot: number for number, shot in enumerate(shots)}
    bottom, top = limits(
        [*(y + sign * half for line in lines for _, y, half in line.points for sign in (-1, 1)),
         *(y for line in lines for _, y in line.papers), *(1 / line.way for line in lines), 1.0]
    )  # fmt: skip
    with chart(WIDTH, 3.0) as drawn:
        axes = drawn.subplots()
        ends = apart([line.points[-1][1] for line in lines], 0.06 * (top - bottom), top)
        for number, (line, end) in enumerate(zip(lines, ends, strict=True)):
            colour, marker = look(number)
            axes.plot([place[shot] for shot, _, _ in line.points], [y for _, y, _ in line.points], color=colour)
            for shot, y, half in line.points:
                axes.plot([place[shot]] * 2, [y - half, y + half], color=colour)
                dot(axes, place[shot], y, f"{line.way}-way {shot}-shot: {percent_text(y, half)}", colour, marker)
            for shot, y in line.papers:
                if shot in place:
                    _published(axes, place[shot], y, f"{line.way}-way {shot}-shot", y)
            axes.axhline(1 / line.way, color=colour, linewidth=1, linestyle=(0, (1, 3)))
            axes.text(1.02, end, f"{line.way}-way {100 * line.points[-1][1]:.1f} %", color=colour, va="center",
                      transform=axes.get_yaxis_transform())  # fmt: skip
        axes.set_xticks(range(len(shots)), [str(shot) for shot in shots])
        axes.set(xlim=(-0.5, max(len(shots), 1) - 0.5), ylim=(bottom, top))
        percent_axis(axes)
        axes.set(xlabel="shots: support images per class", ylabel="accuracy", title=title)
        return render(drawn, kind)


def accuracies(marks: Sequence[Mark], kind: Kind = "png") -> bytes:
    """A row a figure, best first; a diamond is the published figure."""
    marks = sorted(marks, key=lambda mark: -mark.value)
    ends = [m.value + sign * (m.interval or 0.0) for m in marks for sign in (-1, 1)]
    with chart(WIDTH, 0.7 + 0.25 * len(marks)) as drawn:
        axes = drawn.subplots()
        for row, mark in enumerate(marks):
            half = mark.interval or 0.0
            axes.plot([mark.value - half, mark.value + half], [row, row], color=PALETTE[0])
            dot(axes, mark.value, row, f"{mark.label}: {percent_text(mark.value, mark.interval)}")
            if mark.paper is not None:
                _published(axes, mark.paper, row, mark.label, mark.paper)
        _rows(axes, [mark.label for mark in marks], "accuracy")
        axes.set_xlim(limits([*ends, *(m.paper for m in marks if m.paper is not None)]))
        return render(drawn, kind)


def error_rates(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], kind: Kind = "png") -> bytes:
    """A row a setting, with a mark for each of its rates, which the legend names."""
    with chart(WIDTH, 1.0 + 0.26 * len(rows)) as drawn:
        axes = drawn.subplots()
        for row, (label, rates) in enumerate(rows):
            for number, (name, value) in enumerate(rates):
                legend = name if row == 0 else None
                text = f"{label}, {name}: {percent_text(value)}"
                dot(axes, value, row, text, *look(number), linestyle="", label=legend)
        _rows(axes, [label for label, _ in rows], "share")
        axes.set_xlim(-0.005, limits([0.0, *(value for _, rates in rows for _, value in rates)])[1])
        if rows:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, borderpad=0)
        return render(drawn, kind)


def reliability(bins: Sequence[tuple[float, float, int]], kind: Kind = "png") -> bytes:
    """Stated probability (first) against share of right answers (second), marks by the number of queries (third)."""
    total = max(1, sum(count for _, _, count in bins))
    with chart(WIDTH, 3.4) as drawn:
        axes = drawn.subplots()
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1.2, linestyle=(0, (5, 4)))
        axes.text(0.86, 0.96, "as stated", color=FAINT, ha="right", va="center")
        axes.plot([x for x, _, _ in bins], [y for _, y, _ in bins], color=PALETTE[0], linewidth=1.2)
        for x, y, count in bins:
            text = f"{count:,} queries answered with {percent_text(x)} on average: {percent_text(y)} right"
            dot(axes, x, y, text, markersize=4 + 12 * math.sqrt(count / total))
        axes.set_aspect("equal", adjustable="box")
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        percent_axis(axes, "x")
        percent_axis(axes)
        axes.set(xlabel="stated probability", ylabel="share of right answers")
        return render(drawn, kind)


def _published(axes: Axes, x: float, y: float, label: str, accuracy: float) -> None:
    text = f"{label}, published: {percent_text(accuracy)}"
    dot(axes, x, y, text, PAPER, "D", markersize=6, markerfacecolor=BACK, markeredgewidth=1.6)


def _rows(axes: Axes, labels: Sequence[str], name: str) -> None:
    axes.set_yticks(range(len(labels)), [short(label, 26) for label in labels], color=INK)
    axes.set_ylim(max(len(labels), 1) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    percent_axis(axes, "x")
    axes.set_xlabel(name)


def _thin(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Means of neighbours, so that a long training draws as fast as a short one."""
    each = max(1, -(-len(points) // most))
    groups = [points[i : i + each] for i in range(0, len(points), each)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
