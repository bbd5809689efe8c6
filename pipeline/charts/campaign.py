"""Charts of a campaign: accuracy over a searched number, parallel coordinates, trials over time."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from pipeline.charts.style import (
    BACK,
    FAINT,
    HEAT,
    INK,
    STATUS,
    WIDTH,
    Kind,
    chart,
    dot,
    legend,
    limits,
    look,
    number_axis,
    percent_axis,
    percent_text,
    render,
    short,
    tip,
)  # fmt: skip

WIDE = 8.0
BROKEN = (0, (4, 3))


class Trial:
    """What a ledger and a tracking store tell of a trial; ``began`` and ``ended`` are seconds since 1970."""

    number: int
    seed: int | None
    values: Mapping[str, Any]
    status: str
    reason: str
    curve: Sequence[tuple[int, float]]  # (step, validation accuracy) of every validation
    began: float
    ended: float | None

    @property
    def step(self) -> int:
        return self.curve[-1][0] if self.curve else 0

    def score(self, select: str) -> float | None:
        """Accuracy of the checkpoint that the run stands for, its "last" or its best one; None: not one validation."""
        if not self.curve:
            return None
        return self.curve[-1][1] if select == "last" else max(accuracy for _, accuracy in self.curve)


class Dimension(Protocol):
    """A searched key: a range, or choices."""

    low: float | None
    high: float | None
    log: bool
    choices: list[Any] | None


@dataclass(frozen=True)
class Finalist:
    """A configuration's mean over seeds with its interval."""

    values: Mapping[str, Any]
    accuracy: float
    interval: float | None


def value_text(value: Any) -> str:
    """As it stands on a command line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def last(key: str) -> str:
    """A key without its section."""
    return key.rpartition(".")[2]


def groups_of(space: Mapping[str, Dimension], trials: Sequence[Trial]) -> dict[int, str]:
    """Of every trial by number, what tells its colour: its value of the first searched choice that differs."""
    for key, dimension in space.items():
        if dimension.choices is not None and len({value_text(t.values.get(key)) for t in trials}) > 1:
            return {t.number: f"{last(key)} {value_text(t.values.get(key))}" for t in trials}
    return {t.number: "trials" for t in trials}


def accuracy_over(
    key: str,
    space: Mapping[str, Dimension],
    trials: Sequence[Trial],
    select: str,
    default: Mapping[str, Any] | None = None,
    finalists: Sequence[Finalist] = (),
    title: str = "",
    kind: Kind = "png",
) -> bytes:
    """A mark a trial, in the colour of its group; hollow where it was stopped, a cross on the axis where it failed.
    Finalists have their interval; 0 on a logarithmic axis is a line of its own."""
    dimension = space[key]
    mine = [trial for trial in trials if is_number(trial.values.get(key))]
    groups = groups_of(space, mine)
    order = list(dict.fromkeys(groups.values()))

    def placed(values: Mapping[str, Any]) -> bool:
        return is_number(values.get(key)) and (not dimension.log or values[key] > 0)

    shown = [trial for trial in mine if placed(trial.values)]
    ends = [value for value in (dimension.low, dimension.high) if value is not None]
    across = [*(float(trial.values[key]) for trial in shown), *ends]
    bounds = (min(across, default=1.0), max(across, default=10.0))
    scores = [score for trial in mine if (score := trial.score(select)) is not None]
    heights = [f.accuracy + sign * (f.interval or 0.0) for f in finalists for sign in (-1, 1)]
    with chart(WIDTH, 3.3) as drawn:
        axes = drawn.subplots()
        number_axis(axes, dimension.log, all(isinstance(t.values[key], int) for t in shown), *bounds)
        for trial in shown:
            group = order.index(groups[trial.number])
            _mark(axes, trial, float(trial.values[key]), select, *look(group), key)
        for trial in mine:
            score = trial.score(select)
            if not placed(trial.values) and score is not None:
                axes.axhline(score, color=INK, linewidth=1, linestyle=BROKEN)
                axes.text(1.0, score, f"{last(key)} {value_text(trial.values[key])}", fontsize=8, ha="right",
                          va="bottom", transform=axes.get_yaxis_transform())  # fmt: skip
        for finalist in finalists:
            if placed(finalist.values):
                axes.errorbar(float(finalist.values[key]), finalist.accuracy, finalist.interval or 0.0, color=INK,
                              marker="_", markersize=12, elinewidth=1.8, zorder=4)  # fmt: skip
        if default is not None and placed(default):
            axes.axvline(default[key], color=FAINT, linewidth=1, linestyle=BROKEN)
            axes.text(default[key], 1.0, "default", color=FAINT, fontsize=8, va="bottom", ha="center",
                      transform=axes.get_xaxis_transform())  # fmt: skip
        percent_axis(axes)
        axes.set_title(title, pad=14)
        label = f"{short(key, 50)}{' (log scale)' if dimension.log else ''}"
        axes.set(xlabel=label, ylabel="validation accuracy", ylim=limits([*scores, *heights]))
        for number, name in enumerate(order):
            colour, marker = look(number)
            axes.plot([], [], color=colour, marker=marker, linestyle="", label=short(name, 30))
        legend(drawn)
        return render(drawn, kind)


def parallel_coordinates(
    space: Mapping[str, Dimension], trials: Sequence[Trial], select: str, kind: Kind = "png"
) -> bytes:
    """A line a trial through its values to its accuracy, light for the worst and dark for the best; a key that it does
    not have is passed by."""
    scored = [(trial, score) for trial in trials if (score := trial.score(select)) is not None]
    scored.sort(key=lambda pair: pair[1])
    differ = [key for key in space if len({value_text(t.values[key]) for t, _ in scored if key in t.values}) > 1]
    keys = differ or list(space)
    low, high = (scored[0][1], scored[-1][1]) if scored else (0.0, 1.0)
    high = high if high > low else low + 1e-6
    with chart(max(WIDTH, min(WIDE, 1.5 * (len(keys) + 1))), 3.6) as drawn:
        axes = drawn.subplots()
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        for trial, score in scored:
            values = [(i, _height(space[key], trial.values.get(key))) for i, key in enumerate(keys)]
            points = [(i, height) for i, height in values if height is not None]
            part = (score - low) / (high - low)
            line = axes.plot(*zip(*[*points, (len(keys), part)], strict=True), color=HEAT[round(10 * part)],
                             linewidth=1.4, linestyle="-" if trial.status == "finished" else BROKEN)[0]  # fmt: skip
            tip(line, f"trial {trial.number}: {percent_text(score)}, {trial.status}")
        for number, key in enumerate(keys):
            _axis(axes, number, space[key])
        axes.axvline(len(keys), color=FAINT, linewidth=1.2)
        for part in np.linspace(0, 1, 5):
            axes.text(len(keys) + 0.04, part, f"{100 * (low + part * (high - low)):.1f} %", va="center", color=FAINT)
        axes.set_xticks(range(len(keys) + 1), [*(short(last(key), 18) for key in keys), "accuracy"], color=INK)
        axes.set_yticks([])
        axes.set_xlim(-0.6, len(keys) + 0.45)
        return render(drawn, kind)


def trials_over_time(trials: Sequence[Trial], select: str, kind: Kind = "png") -> bytes:
    """When every trial ran and how it ended, and above it the accuracies and the best so far. An interrupted trial
    spans the pause."""
    begun = sorted((t for t in trials if t.began > 0), key=lambda t: (t.began, t.number))
    start = begun[0].began if begun else 0.0
    longest = max([(t.ended or t.began) - start for t in begun] or [1.0]) or 1.0
    unit, name = (60.0, "minutes") if longest < 7200 else (3600.0, "hours")
    scores = [(t, (t.ended - start) / unit, s) for t in begun if t.ended and (s := t.score(select)) is not None]
    lower = 0.19 * max(4, len(begun))
    with chart(WIDE, 2.4 + lower) as drawn:
        above, below = drawn.subplots(2, 1, sharex=True, height_ratios=[1.5, lower])
        best: list[tuple[float, float]] = []
        for trial, at, score in sorted(scores, key=lambda found: found[1]):
            _mark(above, trial, at, select, STATUS.get(trial.status, FAINT), "o", "")
            if trial.seed is None and trial.status != "failed":
                best.append((at, max(score, best[-1][1] if best else 0.0)))
        if best:
            above.step(*zip(*best, strict=True), where="post", color=INK, linewidth=1.2)
        above.set(ylabel="validation accuracy", ylim=limits([score for _, _, score in scores]))
        percent_axis(above)
        for row, trial in enumerate(begun):
            left, right = ((at - start) / unit for at in (trial.began, trial.ended or trial.began))
            bar = below.barh(row, max(right - left, longest / unit / 300), left=left, height=0.7,
                             color=STATUS.get(trial.status, FAINT))[0]  # fmt: skip
            tip(bar, f"{_who(trial)}: {trial.status}{': ' if trial.reason else ''}{trial.reason}")
            if trial.status != "finished":
                text, late = f"{trial.status} at step {trial.step:,}", right > 0.75 * longest / unit
                below.text(left if late else right, row, f"{text} " if late else f" {text}", fontsize=8, va="center",
                           ha="right" if late else "left", color=FAINT)  # fmt: skip
        below.set_ylim(len(begun) - 0.3, -0.7)
        below.set_yticks(range(len(begun)), [_who(trial) for trial in begun], fontsize=8)
        below.grid(axis="y", visible=False)
        below.set_xlabel(f"{name} since the campaign began")
        for status, colour in STATUS.items():
            if any(trial.status == status for trial in begun):
                above.plot([], [], marker="s", color=colour, linestyle="", label=status)
        legend(drawn)
        return render(drawn, kind)


def _mark(axes: Axes, trial: Trial, at: float, select: str, colour: str, marker: str, key: str) -> None:
    """Where a trial stands, hollow where it was not trained to its end, on the axis where it has no accuracy."""
    value = f" {value_text(trial.values[key])}," if key else ""
    score = trial.score(select)
    if score is None:
        text = f"{_who(trial)}:{value} {trial.status}: {trial.reason}"
        on_the_axis = axes.get_xaxis_transform()
        dot(axes, at, 0.02, text, STATUS["failed"], "x", linestyle="", clip_on=False, transform=on_the_axis)
        return
    text = f"{_who(trial)}:{value} {percent_text(score)}, {trial.status}"
    face = colour if trial.status == "finished" else BACK
    dot(axes, at, score, text, colour, marker, markerfacecolor=face, linestyle="")


def _who(trial: Trial) -> str:
    return f"trial {trial.number}" if trial.seed is None else f"{trial.number}, seed {trial.seed}"


def _height(dimension: Dimension, value: Any) -> float | None:
    """Where a value stands on its axis, in [0, 1]; None: it has no place there."""
    if dimension.choices is not None:
        names = [value_text(choice) for choice in dimension.choices]
        return names.index(value_text(value)) / max(1, len(names) - 1) if value_text(value) in names else None
    low, high = dimension.low, dimension.high
    if not is_number(value) or low is None or high is None or not high > low:
        return None
    if dimension.log:
        low, high, value = math.log(low), math.log(high), math.log(max(value, low))
    return float(np.clip((value - low) / (high - low), 0, 1))


def _axis(axes: Axes, number: int, dimension: Dimension) -> None:
    axes.axvline(number, color=FAINT, linewidth=1.2)
    values = dimension.choices if dimension.choices is not None else [dimension.low, dimension.high]
    for value in values:
        height = _height(dimension, value)
        if height is not None:
            axes.text(number - 0.04, height, short(value_text(value), 16), ha="right", va="center", color=FAINT,
                      zorder=5, path_effects=[withStroke(linewidth=2.5, foreground=BACK)])  # fmt: skip
