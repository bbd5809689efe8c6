"""Plots of a campaign: accuracy over every searched number, parallel coordinates, trials over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from pipeline.charts.style import FAINT, INK, MARKERS, PALETTE, WRONG, Kind, figure, render, style
from pipeline.search.campaign import Campaign
from pipeline.search.finalists import Standing, Verdict
from pipeline.search.ledger import Ledger, Record
from pipeline.search.results import value_text
from pipeline.search.space import Dimension, Space, Values

_STATUS = {"finished": PALETTE[2], "stopped": PALETTE[4], "failed": WRONG, "running": FAINT}


def draw_campaign(campaign: Campaign, ledger: Ledger, verdict: Verdict | None) -> dict[str, bytes]:
    """Every plot as SVG and PNG, by file name."""
    records, select = ledger.search, campaign.train.validation.select
    standings = verdict.standings if verdict and campaign.config.finalists.seeds > 1 else []
    out: dict[str, bytes] = {}
    kinds: tuple[Kind, Kind] = ("svg", "png")
    for kind in kinds:
        for key, dimension in campaign.space.dimensions.items():
            if dimension.choices is None and any(key in record.values and record.curve for record in records):
                drawn = accuracy_over(key, campaign.space, records, select, campaign.default, standings, kind=kind)
                out[f"accuracy_over_{key}.{kind}"] = drawn
        out[f"parallel_coordinates.{kind}"] = parallel_coordinates(campaign.space, records, select, kind)
        out[f"trials_over_time.{kind}"] = trials_over_time([*records, *ledger.repetitions], select, kind)
    return out


def accuracy_over(
    key: str,
    space: Space,
    records: Sequence[Record],
    select: str,
    default: Values | None = None,
    standings: Sequence[Standing] = (),
    title: str = "",
    kind: Kind = "png",
) -> bytes:
    """Validation accuracy over a searched number, a colour for every value of the first searched choice.

    Stopped trials are hollow, failed ones stand on the axis; finalists have their mean and interval over the seeds.
    """
    dimension = space.dimensions[key]
    known, beside = _on_axis(dimension, [record for record in records if key in record.values], key)
    choice = _colour_key(key, space, known)
    groups = list(dict.fromkeys(str(record.values.get(choice)) for record in known)) if choice else [""]
    with style():
        drawn = figure(7, 4.4)
        axes = drawn.subplots()
        for number, group in enumerate(groups):
            colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
            of_group = [r for r in known if choice is None or str(r.values.get(choice)) == group]
            _scatter(axes, key, of_group, select, colour, marker, f"{_last(choice)} {group}" if choice else "trial")
            for standing in standings:
                if any(standing.record.number == record.number for record in of_group):
                    found = standing.estimate
                    axes.errorbar(standing.record.values[key], found.mean, found.interval, color=colour, marker="_",
                                  markersize=12, capsize=5, elinewidth=2.5, zorder=4)  # fmt: skip
        axes.plot([], [], color=FAINT, marker="o", markerfacecolor="none", linestyle="", label="stopped early")
        if any(record.status == "failed" for record in known):
            axes.plot([], [], color=WRONG, marker="x", linestyle="", label="failed")
        if standings:
            axes.errorbar([], [], [], color=INK, marker="_", capsize=4, label="mean over seeds ± 95 %")
        for record in beside:  # 0 on a logarithmic axis
            score = record.score(select)
            if score is not None:
                axes.axhline(score, color=INK, linewidth=1, linestyle=(0, (4, 3)))
                axes.text(1.0, score, f"{_last(key)} {value_text(record.values[key])}", fontsize=8, ha="right",
                          va="bottom", transform=axes.get_yaxis_transform())  # fmt: skip
        if default and key in default and (not dimension.log or default[key] > 0):
            axes.axvline(default[key], color=FAINT, linewidth=1, linestyle=(0, (1, 3)))
            axes.text(default[key], 1.0, f" default {value_text(default[key])}", color=FAINT, fontsize=8, va="bottom",
                      ha="center", transform=axes.get_xaxis_transform())  # fmt: skip
        _scale(axes, dimension)
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, 0.0), min(top, 1.005))  # an interval over two seeds may be wider than all there is
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        axes.set_xlabel(key)
        axes.set_ylabel("validation accuracy")
        axes.set_title(title or f"Accuracy over {key}", pad=18)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return render(drawn, kind)


def parallel_coordinates(space: Space, records: Sequence[Record], select: str, kind: Kind = "png") -> bytes:
    """A line a trial through its values, coloured by its accuracy; a key that it does not have is passed by."""
    scored = [(record, record.score(select)) for record in records]
    lines = sorted(((r, s) for r, s in scored if s is not None), key=lambda pair: pair[1])
    differ = [key for key in space.dimensions if len({str(r.values[key]) for r in records if key in r.values}) > 1]
    keys = differ or list(space.dimensions)
    with style():
        drawn = figure(max(6.0, 1.6 * (len(keys) + 1)), 4.4)
        axes = drawn.subplots()
        axes.grid(False)
        scores = [score for _, score in lines] or [0.0, 1.0]
        norm = Normalize(min(scores), max(scores) if max(scores) > min(scores) else min(scores) + 1e-6)
        colours = colormaps["viridis"]
        for record, score in lines:
            points = [
                (i, _height(space.dimensions[k], record.values[k])) for i, k in enumerate(keys) if k in record.values
            ]
            points.append((len(keys), float(norm(score))))
            axes.plot(*zip(*points, strict=True), color=colours(norm(score)), alpha=0.85, linewidth=1.6,
                      linestyle="-" if record.status == "finished" else (0, (3, 2)))  # fmt: skip
        for number, key in enumerate(keys):
            _axis(axes, number, space.dimensions[key])
        axes.axvline(len(keys), color=INK, linewidth=1)
        axes.set_xticks(range(len(keys) + 1), [*(_last(key) for key in keys), "accuracy"])
        axes.set_yticks([])
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_xlim(-0.45, len(keys) + 0.1)
        axes.set_title("Trials, by accuracy (dashed: stopped early or failed)")
        bar = drawn.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.02)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        bar.outline.set_visible(False)
        return render(drawn, kind)


def trials_over_time(records: Sequence[Record], select: str, kind: Kind = "png") -> bytes:
    """When every trial ran and how it ended, and the best accuracy so far. An interrupted trial spans the pause."""
    begun = sorted(records, key=lambda record: record.began)
    start = begun[0].began if begun else 0.0
    with style():
        drawn = figure(8.5, 2.6 + 0.2 * max(6, len(begun)))
        above, below = drawn.subplots(2, 1, sharex=True, height_ratios=[2, max(2.5, 0.22 * len(begun))])
        ends = [(record.ended - start, record) for record in begun if record.ended is not None]
        unit, name = (60.0, "minutes") if max((end for end, _ in ends), default=0) < 7200 else (3600.0, "hours")
        best: list[tuple[float, float]] = []
        for end, record in sorted(ends, key=lambda pair: pair[0]):
            score = record.score(select)
            if score is not None:
                above.plot(end / unit, score, marker="o", color=_STATUS[record.status], linestyle="")
                best.append((end / unit, max(score, best[-1][1] if best else 0.0)))
        if best:
            above.step(*zip(*best, strict=True), where="post", color=INK, linewidth=1.2)
        above.set_ylabel("accuracy")
        above.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        above.set_title("Trials over time, and the best so far")
        longest = max([end for end, _ in ends] or [1.0]) / unit
        for row, record in enumerate(begun):
            left, right = (record.began - start) / unit, ((record.ended or record.began) - start) / unit
            below.barh(row, max(right - left, longest / 300), left=left, color=_STATUS[record.status], height=0.7)
            if record.reason:
                text = record.reason if len(record.reason) <= 60 else f"{record.reason[:59]}…"
                late = right > 0.6 * longest
                below.text(left if late else right, row, f"{text} " if late else f" {text}", fontsize=6.5, va="center",
                           ha="right" if late else "left", color=INK)  # fmt: skip
        below.set_ylim(len(begun) - 0.3, -0.7)
        below.set_yticks(range(len(begun)), [_label(record) for record in begun], fontsize=7)
        below.grid(axis="y", visible=False)
        below.set_xlabel(f"{name} since the campaign began")
        for status, colour in _STATUS.items():
            if any(record.status == status for record in begun):
                above.plot([], [], marker="s", color=colour, linestyle="", label=status)
        above.legend(fontsize=8, loc="lower right", ncols=4)
        return render(drawn, kind)


def _scatter(
    axes: Axes, key: str, records: Sequence[Record], select: str, colour: str, marker: str, label: str
) -> None:
    for hollow in (True, False):
        chosen = [r for r in records if r.curve and r.status != "failed" and (r.status != "finished") is hollow]
        x, y = [record.values[key] for record in chosen], [record.score(select) or 0.0 for record in chosen]
        face = "none" if hollow else colour
        axes.plot(x, y, color=colour, marker=marker, markersize=6, markerfacecolor=face, linestyle="", alpha=0.85,
                  label=None if hollow else label)  # fmt: skip
    failed = [record.values[key] for record in records if record.status == "failed"]
    axes.plot(failed, [0.015] * len(failed), color=WRONG, marker="x", linestyle="", markersize=6,
              transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip


def _on_axis(dimension: Dimension, records: Sequence[Record], key: str) -> tuple[list[Record], list[Record]]:
    """Trials that have a place on the axis, and those that have none."""
    places = [not dimension.log or record.values[key] > 0 for record in records]
    pairs = list(zip(records, places, strict=True))
    return [record for record, on in pairs if on], [record for record, on in pairs if not on]


def _scale(axes: Axes, dimension: Dimension) -> None:
    if dimension.log:
        axes.set_xscale("log")
        assert dimension.low is not None and dimension.high is not None
        decades = np.log10(dimension.high / dimension.low)
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif dimension.integer:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _colour_key(key: str, space: Space, records: Sequence[Record]) -> str | None:
    """The first searched choice, other than ``key``, that differs among the trials."""
    for other, dimension in space.dimensions.items():
        differs = len({str(record.values.get(other)) for record in records}) > 1
        if other != key and dimension.choices is not None and differs:
            return other
    return None


def _height(dimension: Dimension, value: object) -> float:
    """Where a value stands on its axis, in [0, 1]."""
    if dimension.choices is not None:
        return dimension.choices.index(value) / max(1, len(dimension.choices) - 1)
    low, high, x = float(dimension.low or 0), float(dimension.high or 0), float(value)  # type: ignore[arg-type]
    if dimension.log:
        low, high, x = np.log(low), np.log(high), np.log(max(x, low))
    return float(np.clip((x - low) / (high - low), 0, 1))


def _axis(axes: Axes, number: int, dimension: Dimension) -> None:
    axes.axvline(number, color=INK, linewidth=1)
    ticks: Mapping[float, object]
    if dimension.choices is not None:
        ticks = {_height(dimension, choice): choice for choice in dimension.choices}
    else:
        ticks = {0.0: dimension.low, 1.0: dimension.high}
    for height, value in ticks.items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        axes.text(number - 0.03, height, text, fontsize=7.5, ha="right", va="center", color=INK, zorder=5,
                  path_effects=[withStroke(linewidth=2.5, foreground="white")])  # fmt: skip


def _label(record: Record) -> str:
    return f"{record.number}" if record.seed is None else f"{record.number}, seed {record.seed}"


def _last(key: str | None) -> str:
    return (key or "").rpartition(".")[2]
