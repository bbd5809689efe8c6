"""Charts of classes: images as a model sees them, on a plane, and an episode with its answers."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpec

from pipeline.charts.style import (
    FAINT,
    INK,
    RIGHT,
    WIDTH,
    WRONG,
    Kind,
    chart,
    look,
    render,
    short,
    tip,
)  # fmt: skip


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


def projection(
    points: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    variance: Sequence[float],
    title: str = "",
    kind: Kind = "png",
) -> bytes:
    """Points [N, 2] of classes (labels [N], places in ``names``) in equal scales, each class with its colour and
    marker: seven colours and eight markers give 56 different pairs."""
    with chart(WIDTH + 0.8, 3.9) as drawn:
        axes = drawn.subplots()
        for number, label in enumerate(np.unique(labels)):
            colour, marker = look(number)
            mine, name = points[labels == label], names[int(label)]
            marks = axes.plot(mine[:, 0], mine[:, 1], color=colour, marker=marker, linestyle="", alpha=0.75,
                              markeredgewidth=0, label=short(name, 20))[0]  # fmt: skip
            tip(marks, name)
        axes.set_aspect("equal", adjustable="datalim")
        axes.margins(0.06)
        axes.grid(False)
        axes.spines[["left", "top", "right"]].set_visible(True)
        first, second = (f"{100 * part:.0f} % of variance" for part in variance)
        axes.set(xlabel=f"first principal component ({first})", ylabel=f"second ({second})", title=title)
        axes.set(xticks=[], yticks=[])
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handletextpad=0.2)
        return render(drawn, kind)


def episode_picture(
    support: np.ndarray,
    support_labels: np.ndarray,
    query: np.ndarray,
    query_labels: np.ndarray,
    answers: np.ndarray,
    title: str = "",
    kind: Kind = "png",
) -> bytes:
    """One episode: a row a class with its support images and its queries, framed by whether they were recognised.

    Args:
        support: uint8 [S, C, H, W]; support_labels: int [S].
        query: uint8 [Q, C, H, W]; query_labels, answers: int [Q], the true and the given class.
    """
    ways = sorted(set(support_labels.tolist()))
    shots = max(int((support_labels == label).sum()) for label in ways)
    asked = max(int((query_labels == label).sum()) for label in ways)
    right = float(np.mean(query_labels == answers)) if len(answers) else 0.0
    columns = shots + asked
    with chart(1.2 + 1.02 * columns, 0.7 + 1.12 * len(ways)) as drawn:
        grid = GridSpec(len(ways), columns + 2, figure=drawn, width_ratios=[0.9, *[1] * shots, 0.35, *[1] * asked])
        for row, label in enumerate(ways):
            axes = drawn.add_subplot(grid[row, 0])
            axes.axis("off")
            axes.text(1.0, 0.5, f"class {label}", ha="right", va="center", color=INK, fontsize=9)
            for column, image in enumerate(support[support_labels == label]):
                axes = drawn.add_subplot(grid[row, 1 + column])
                _picture(axes, image, FAINT, 1.0)
                if row == 0 and column == 0:
                    axes.set_title("support", fontsize=10, weight="normal", pad=6)
            for column, index in enumerate(np.flatnonzero(query_labels == label)):
                axes = drawn.add_subplot(grid[row, 2 + shots + column])
                correct = bool(answers[index] == label)
                _picture(axes, query[index], RIGHT if correct else WRONG, 2.5)
                mark = "✓" if correct else f"✗ class {answers[index]}"
                axes.set_xlabel(mark, color=RIGHT if correct else WRONG, fontsize=8, labelpad=2)
                if row == 0 and column == 0:
                    axes.set_title("queries", fontsize=10, weight="normal", pad=6)
        drawn.suptitle(f"{title or 'One episode'}: {100 * right:.0f} % right", x=0.01, ha="left", weight="bold")
        return render(drawn, kind)


def _picture(axes: Axes, image: np.ndarray, colour: str, width: float) -> None:
    grey = image.shape[0] == 1
    shown = axes.imshow(image[0] if grey else image.transpose(1, 2, 0), cmap="gray" if grey else None, vmin=0, vmax=255)
    shown.set_clip_on(False)  # it fills its axes; an SVG names clip paths after memory addresses
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=width)
    axes.grid(False)
