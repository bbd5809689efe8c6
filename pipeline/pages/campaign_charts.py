"""The plots of a campaign's page: accuracy over a searched number, parallel coordinates, trials over time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from pipeline.pages.charts import BOTTOM, LEFT, RIGHT, TOP, WIDTH, labels, left_axis, percent_text, short
from pipeline.pages.facts import Dimension, Finalist, Trial
from pipeline.pages.svg import Drawing, Scale, series, spread

STATUS = {"finished": "good", "stopped": "warn", "failed": "bad"}
WIDE, HEAT = 760.0, 10


def value_text(value: Any) -> str:
    """As it stands on a command line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def accuracy_over(
    key: str,
    dimension: Dimension,
    trials: Sequence[Trial],
    select: str,
    groups: Mapping[int, str],
    default: Trial | None,
    finalists: Sequence[Finalist],
) -> Markup:
    """A mark a trial, in the colour of its group by number; hollow where it was stopped; finalists with intervals."""
    order = list(dict.fromkeys(groups.values()))
    top = 14.0 + 18 * math.ceil(len(order) / 3)
    height = top + 236 + BOTTOM
    drawing = Drawing(WIDTH, height, f"Validation accuracy over {key}")
    shown = [t for t in trials if is_number(t.values.get(key)) and (not dimension.log or t.values[key] > 0)]
    scored = [(t, score) for t in shown if (score := t.score(select)) is not None]
    ends = [v for v in (dimension.low, dimension.high) if v is not None]
    low, high = spread([*(float(t.values[key]) for t in shown), *ends], dimension.log, 0.03)
    across = Scale(low, high, LEFT, WIDTH - RIGHT, dimension.log)
    chosen = [f for f in finalists if is_number(f.values.get(key)) and low <= f.values[key] <= high]
    heights = [f.accuracy + sign * (f.interval or 0.0) for f in chosen for sign in (-1, 1)]
    floor, ceiling = spread([*(score for _, score in scored), *heights])
    up = Scale(max(0.0, floor), min(1.0, ceiling), height - BOTTOM, top)
    left_axis(drawing, up, LEFT, WIDTH - RIGHT, "")
    for tick in across.ticks():
        drawing.text(across(tick), height - BOTTOM + 16, f"{tick:g}", "tick", "middle")
    drawing.text(
        (LEFT + WIDTH) / 2, height - 6, f"{short(key, 50)}{' (log scale)' if dimension.log else ''}", "name", "middle"
    )
    for number, group in enumerate(order):
        x, y = 12.0 + (number % 3) * 148, 14.0 + 18 * (number // 3)
        drawing.marker(x, y - 4, series(number), number)
        drawing.text(x + 10, y, short(group, 20), "label")
    if default is not None and is_number(default.values.get(key)) and low <= default.values[key] <= high:
        at = across(float(default.values[key]))
        drawing.line(at, up.start, at, up.end, "dashes")
        drawing.text(
            at + (4 if at < WIDTH - 60 else -4), up.end + 8, "default", "tick", "start" if at < WIDTH - 60 else "end"
        )
    for trial, score in scored:
        number = order.index(groups[trial.number]) if trial.number in groups else 0
        kind = f"{series(number)} {'' if trial.status == 'finished' else 'hollow'}"
        tip = f"trial {trial.number}: {trial.values[key]:.4g}, {percent_text(score)}, {trial.status}"
        drawing.marker(across(float(trial.values[key])), up(score), kind, number, tip)
    for trial in shown:
        if trial.score(select) is None:
            tip = f"trial {trial.number}: {trial.values[key]:.4g}, {trial.status}: {trial.reason}"
            drawing.marker(across(float(trial.values[key])), up.start, "s-bad", 3, tip)
    for finalist in chosen:
        x = across(float(finalist.values[key]))
        half = finalist.interval or 0.0
        y1, y2 = (up(min(up.high, max(up.low, finalist.accuracy + sign * half))) for sign in (-1, 1))
        drawing.line(x, y1, x, y2, "whisker ink")
        drawing.line(x - 7, up(finalist.accuracy), x + 7, up(finalist.accuracy), "whisker ink")
    return drawing.svg()


def parallel_coordinates(space: Mapping[str, Dimension], trials: Sequence[Trial], select: str) -> Markup:
    """A line a trial through its values to its accuracy, light for the worst and dark for the best."""
    scored = sorted(((t, s) for t in trials if (s := t.score(select)) is not None), key=lambda pair: pair[1])
    differ = [key for key in space if len({str(t.values[key]) for t, _ in scored if key in t.values}) > 1]
    keys, height = differ or list(space), 330.0
    width = max(460.0, min(WIDE, 150.0 * (len(keys) + 1)))
    drawing = Drawing(width, height, "Values of every trial and its accuracy, as parallel coordinates")
    gap = (width - 150) / max(1, len(keys))
    places = [78 + gap * number for number in range(len(keys) + 1)]
    low, high = spread([score for _, score in scored], margin=0.0)
    accuracy = Scale(low, high, height - 34, 44)
    scales = {key: _axis(space[key], [t.values.get(key) for t in trials], accuracy) for key in keys}
    for trial, score in scored:
        points = [(x, scales[k][0](trial.values[k])) for x, k in zip(places, keys, strict=False) if k in trial.values]
        points = [(x, y) for x, y in points if y is not None] + [(places[-1], accuracy(score))]
        level = round(HEAT * (score - low) / (high - low)) if high > low else HEAT
        tip = f"trial {trial.number}: {percent_text(score)}, {trial.status}"
        drawing.path(points, f"v{level}{'' if trial.status == 'finished' else ' broken'}", tip)
    for number, (x, name) in enumerate(zip(places, [*(k.rpartition(".")[2] for k in keys), "accuracy"], strict=True)):
        drawing.line(x, accuracy.start, x, accuracy.end, "axis")
        drawing.text(x, 20 if number % 2 == 0 else 34, short(name, 20), "label strong", "middle")
        if number < len(keys):
            for y, text in scales[keys[number]][1]:
                drawing.text(x - 6, y + 4, short(text, 18), "tick halo", "end")
        else:
            for tick, text in zip(accuracy.ticks(), labels(accuracy.ticks(), True), strict=True):
                drawing.text(x + 6, accuracy(tick) + 4, text, "tick")
    return drawing.svg()


def trials_over_time(trials: Sequence[Trial], select: str) -> Markup:
    """When every trial ran and how it ended; above, its accuracy and the best so far."""
    begun = sorted((t for t in trials if t.began > 0), key=lambda t: (t.began, t.number))
    start = begun[0].began if begun else 0.0
    longest = max([(t.ended or t.began) - start for t in begun] or [1.0]) or 1.0
    unit, name = (60.0, "minutes") if longest < 7200 else (3600.0, "hours")
    left, upper, step = 92.0, 150.0, 18.0
    height = TOP + upper + 20 + step * len(begun) + BOTTOM
    drawing = Drawing(WIDE, height, "Trials over time")
    across = Scale(0.0, longest / unit, left, WIDE - 150)
    scores = {t.run: score for t in begun if (score := t.score(select)) is not None}
    low, high = spread(list(scores.values()))
    up = Scale(max(0.0, low), min(1.0, high), TOP + upper, TOP)
    left_axis(drawing, up, left, WIDE - 150, "validation accuracy")
    best: list[tuple[float, float]] = []
    for trial in sorted((t for t in begun if t.ended and t.run in scores), key=lambda t: t.ended or 0.0):
        x, score = across(((trial.ended or 0.0) - start) / unit), scores[trial.run]
        if trial.seed is None and trial.status != "failed":
            top = max(score, best[-1][1] if best else 0.0)
            best += [(x, best[-1][1]), (x, top)] if best else [(x, top)]
        tip = f"{_who(trial)}: {percent_text(score)}, {trial.status}"
        drawing.marker(x, up(score), f"s-{STATUS.get(trial.status, 'faint')}", _shape(trial), tip)
    drawing.path([(x, up(score)) for x, score in best], "ink thin")
    ticks = across.ticks(6)
    for tick in ticks:
        drawing.line(across(tick), TOP + upper + 16, across(tick), height - BOTTOM, "grid")
        drawing.text(across(tick), height - BOTTOM + 16, f"{tick:g}", "tick", "middle")
    for row, trial in enumerate(begun):
        y = TOP + upper + 20 + step * row
        x1, x2 = (across((at - start) / unit) for at in (trial.began, trial.ended or trial.began))
        tip = f"{_who(trial)}: {trial.status}{': ' if trial.reason else ''}{trial.reason}"
        drawing.bar(x1, y, max(2.0, x2 - x1), step - 5, f"b-{STATUS.get(trial.status, 'faint')}", tip)
        drawing.text(left - 6, y + 10, short(_who(trial), 15), "tick", "end")
        if trial.status != "finished":
            drawing.text(x2 + 5, y + 10, short(f"{trial.status} at step {trial.step:,}", 28), "tick halo")
    drawing.text((left + WIDE - 150) / 2, height - 6, f"{name} since the campaign began", "name", "middle")
    return drawing.svg()


def _who(trial: Trial) -> str:
    return f"trial {trial.number}" if trial.seed is None else f"{trial.number}, seed {trial.seed}"


def _shape(trial: Trial) -> int:
    return {"finished": 0, "stopped": 1}.get(trial.status, 3)


def _axis(dimension: Dimension, values: Sequence[Any], frame: Scale) -> tuple[Any, list[tuple[float, str]]]:
    """From a value to its height (None: it has no place), and the labels of the axis."""
    if dimension.choices is not None:
        names = [value_text(choice) for choice in dimension.choices]
        gap = (frame.end - frame.start) / max(1, len(names))
        places = {name: frame.start + gap * (number + 0.5) for number, name in enumerate(names)}
        return (lambda value: places.get(value_text(value))), [(y, name) for name, y in places.items()]
    numbers = [float(v) for v in [*values, dimension.low, dimension.high] if is_number(v)]
    low, high = spread(numbers, dimension.log, 0.0)
    scale = Scale(low, high, frame.start, frame.end, dimension.log)

    def place(value: Any) -> float | None:
        return scale(value) if is_number(value) and low <= value <= high else None

    return place, [(scale(tick), f"{tick:.4g}") for tick in scale.ticks()]
