"""Plots of a run, from plain arrays to the bytes of a PNG or SVG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpec
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from pipeline.charts.style import FAINT, INK, MARKERS, PALETTE, RIGHT, WRONG, Kind, figure, render, style


def learning_curve(history: Sequence[Mapping[str, float]], title: str = "", kind: Kind = "png") -> bytes:
    """Training loss and validation accuracy with its 95 % interval over the steps.

    Args:
        history: entries with "step" and any of "train/loss", "val/accuracy", "val/interval".
    """
    with style():
        drawn = figure(7, 5)
        above, below = drawn.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        _accuracy_panel(above, _series(history, "val/accuracy"), _series(history, "val/interval"))
        _loss_panel(below, _series(history, "train/loss"))
        above.set_title(title or "Learning curve")
        below.set_xlabel("step")
        return render(drawn, kind)


def accuracy_by_way_and_shot(results: Sequence[Mapping[str, Any]], title: str = "", kind: Kind = "png") -> bytes:
    """Accuracy over the number of shots, one line a way, with 95 % intervals and chance level.

    Args:
        results: entries with "way", "shot", "accuracy" and "interval" (shares, not percent).
    """
    with style():
        drawn = figure(7, 4.2)
        axes = drawn.subplots()
        shots = sorted({int(result["shot"]) for result in results})
        ends: list[tuple[float, str, str]] = []  # where each line ends, its label and colour
        for number, way in enumerate(sorted({int(result["way"]) for result in results})):
            line = sorted((int(r["shot"]), r["accuracy"], r["interval"]) for r in results if int(r["way"]) == way)
            x, accuracy, interval = (np.asarray(column, dtype=float) for column in zip(*line, strict=True))
            colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
            axes.errorbar(np.searchsorted(shots, x), accuracy, interval, color=colour, marker=marker, capsize=4)
            axes.axhline(1 / way, color=colour, linewidth=1, linestyle=(0, (1, 3)))
            ends.append((float(accuracy[-1]), f"{way}-way  {100 * accuracy[-1]:.1f} %", colour))
        heights = _apart(np.asarray([end[0] for end in ends]), 0.055, 1.0)
        for height, (_, label, colour) in zip(heights, ends, strict=True):
            axes.text(len(shots) - 1 + 0.06 * max(1, len(shots) - 1), height, label, color=colour, va="center")
        axes.set_xticks(range(len(shots)), [str(shot) for shot in shots])
        axes.set_xlim(-0.25, len(shots) - 1 + max(0.45, 0.28 * (len(shots) - 1)))
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.set_xlabel("shots (support images per class)")
        axes.set_ylabel("accuracy ± 95 % interval")
        axes.set_title(title or "Accuracy by way and shot")
        axes.text(1.0, 1.0 / min(int(r["way"]) for r in results) + 0.015, "dotted: chance", color=FAINT, fontsize=8,
                  ha="right", transform=axes.get_yaxis_transform())  # fmt: skip
        return render(drawn, kind)


def project(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal components by SVD: embeddings [N, D] to [N, 2], and the shares of variance [2] that they keep.

    Signs are fixed (the largest loading of each axis is positive), so that equal embeddings give equal pictures.
    """
    centred = np.asarray(embeddings, dtype=np.float64) - np.mean(embeddings, axis=0, dtype=np.float64)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    kept = np.zeros((2, centred.shape[1]))
    kept[: len(axes[:2])] = axes[:2]
    signs = np.sign(kept[np.arange(2), np.abs(kept).argmax(axis=1)])
    variance = np.zeros(2)
    variance[: len(values[:2])] = values[:2] ** 2 / max(float((values**2).sum()), np.finfo(float).tiny)
    return centred @ (kept * np.where(signs == 0, 1, signs)[:, None]).T, variance


def embedding_projection(
    embeddings: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str] | None = None,
    title: str = "",
    kind: Kind = "png",
) -> bytes:
    """Embeddings [N, D] of unseen classes in two dimensions, each class (labels [N] int) with its colour and marker."""
    points, variance = project(embeddings)
    with style():
        drawn = figure(6.5, 5.6)
        axes = drawn.subplots()
        for number, label in enumerate(np.unique(labels)):
            chosen = points[labels == label]
            colour = PALETTE[number % len(PALETTE)]
            marker = MARKERS[number % len(MARKERS)]  # seven colours, eight markers: 56 different pairs
            name = names[int(label)] if names is not None else f"class {label}"
            axes.scatter(
                chosen[:, 0], chosen[:, 1], s=28, color=colour, marker=marker, alpha=0.75, linewidths=0, label=name
            )
            axes.annotate(
                name, (chosen[:, 0].mean(), chosen[:, 1].max()), xytext=(0, 5), textcoords="offset points",
                color=colour, weight="bold", ha="center", va="bottom", fontsize=9,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
        axes.set_aspect("equal", adjustable="datalim")
        axes.margins(0.1)
        axes.grid(False)
        axes.set_xlabel(f"first principal component ({100 * variance[0]:.0f} % of variance)")
        axes.set_ylabel(f"second ({100 * variance[1]:.0f} %)")
        axes.set_xticklabels([])
        axes.set_yticklabels([])
        axes.set_title(title or "Embeddings of unseen classes")
        return render(drawn, kind)


def episode_picture(
    support: np.ndarray,
    support_labels: np.ndarray,
    query: np.ndarray,
    query_labels: np.ndarray,
    answers: np.ndarray,
    names: Sequence[str] | None = None,
    title: str = "",
    kind: Kind = "png",
) -> bytes:
    """One episode: a row a class with its support images and its queries, framed by whether they were recognised.

    Args:
        support: uint8 [S, C, H, W]; support_labels: int [S].
        query: uint8 [Q, C, H, W]; query_labels, answers: int [Q], the true and the given class.
        names: of the classes, by label.
    """
    ways = sorted(set(np.asarray(support_labels).tolist()))
    shots = max(int((support_labels == label).sum()) for label in ways)
    asked = max(int((query_labels == label).sum()) for label in ways)
    name = (lambda label: names[label]) if names is not None else (lambda label: f"class {label}")
    right = float(np.mean(np.asarray(query_labels) == np.asarray(answers))) if len(answers) else 0.0
    with style():
        columns = shots + asked
        drawn = figure(1.2 + 1.02 * columns, 0.7 + 1.12 * len(ways))
        grid = GridSpec(len(ways), columns + 2, figure=drawn, width_ratios=[0.9, *[1] * shots, 0.35, *[1] * asked])
        for row, label in enumerate(ways):
            _name_cell(drawn.add_subplot(grid[row, 0]), name(label))
            for column, image in enumerate(support[np.asarray(support_labels) == label]):
                axes = drawn.add_subplot(grid[row, 1 + column])
                _picture(axes, image, FAINT, 1.0)
                if row == 0 and column == 0:
                    axes.set_title("support", fontsize=10, weight="normal", pad=6)
            for column, index in enumerate(np.flatnonzero(np.asarray(query_labels) == label)):
                axes = drawn.add_subplot(grid[row, 2 + shots + column])
                correct = bool(answers[index] == label)
                _picture(axes, query[index], RIGHT if correct else WRONG, 2.5)
                mark = "✓" if correct else f"✗ {name(int(answers[index]))}"
                axes.set_xlabel(mark, color=RIGHT if correct else WRONG, fontsize=8, labelpad=2)
                if row == 0 and column == 0:
                    axes.set_title("queries", fontsize=10, weight="normal", pad=6)
        drawn.suptitle(f"{title or 'One episode'}: {100 * right:.0f} % right", x=0.01, ha="left", weight="bold")
        return render(drawn, kind)


def _series(history: Sequence[Mapping[str, float]], key: str) -> np.ndarray:
    """[N, 2] steps and values of the entries that have ``key``."""
    pairs = [(entry["step"], entry[key]) for entry in history if key in entry]
    return np.asarray(pairs, dtype=float).reshape(-1, 2)


def _accuracy_panel(axes: Axes, accuracy: np.ndarray, interval: np.ndarray) -> None:
    axes.set_ylabel("validation accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    if not len(accuracy):
        axes.text(0.5, 0.5, "no validation yet", transform=axes.transAxes, ha="center", color=FAINT)
        return
    step, value = accuracy.T
    axes.plot(step, value, color=PALETTE[0], marker="o")
    half = dict(interval.tolist())
    spread = np.asarray([half.get(s, 0.0) for s in step])
    axes.fill_between(step, value - spread, np.minimum(value + spread, 1), color=PALETTE[0], alpha=0.18, linewidth=0)
    best = int(value.argmax())
    axes.plot(step[best], value[best], marker="o", markersize=11, markerfacecolor="none", color=PALETTE[0])
    text = f"best {100 * value[best]:.1f} ± {100 * spread[best]:.1f} % at step {int(step[best]):,}"
    axes.set_title(text, loc="right", color=PALETTE[0], fontsize=10, weight="normal")


def _loss_panel(axes: Axes, loss: np.ndarray) -> None:
    axes.set_ylabel("training loss")
    if not len(loss):
        return
    step, value = loss.T
    finite = np.isfinite(value)
    axes.plot(step[finite], value[finite], color=PALETTE[1], linewidth=1, alpha=0.35)
    axes.plot(step[finite], _smooth(value[finite]), color=PALETTE[1])
    smooth = _smooth(value[finite])
    if finite.any() and (value[finite] > 0).all() and smooth.max() > 30 * smooth.min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, float(np.min(value[finite], initial=0.0))))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the points, narrower at both ends so that it is centred everywhere."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    reach = np.minimum(np.minimum(centre, len(values) - 1 - centre), half)
    return (sums[centre + reach + 1] - sums[centre - reach]) / (2 * reach + 1)


def _apart(heights: np.ndarray, gap: float, top: float) -> np.ndarray:
    """``heights`` [N] moved so that neighbours are at least ``gap`` apart and none is above ``top``, in their order."""
    order = np.argsort(-heights, kind="stable")
    placed = heights.astype(float)
    limit = top
    for index in order:
        placed[index] = min(placed[index], limit)
        limit = placed[index] - gap
    return placed


def _name_cell(axes: Axes, name: str) -> None:
    axes.axis("off")
    axes.text(1.0, 0.5, name if len(name) <= 12 else f"{name[:11]}…", ha="right", va="center", color=INK, fontsize=9)


def _picture(axes: Axes, image: np.ndarray, colour: str, width: float) -> None:
    grey = image.shape[0] == 1
    shown = axes.imshow(image[0] if grey else image.transpose(1, 2, 0), cmap="gray" if grey else None, vmin=0, vmax=255)
    shown.set_clip_on(False)  # it fills its axes; an SVG names clip paths after memory addresses
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=width)
    axes.grid(False)
