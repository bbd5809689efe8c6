"""One look for all plots: readable in print, on a screen and by the colour-blind."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib
from matplotlib.figure import Figure

Kind = Literal["png", "svg"]

# Okabe & Ito (2008): eight colours that all common kinds of colour vision tell apart; yellow is left out on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
RIGHT, WRONG = "#0072B2", "#D55E00"
INK, FAINT = "#222222", "#8a8a8a"

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 2.0,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "svg.hashsalt": "pipeline",  # equal figures give equal files
    "text.color": INK,
}


@contextmanager
def style() -> Iterator[None]:
    """The plots' settings, within the block only."""
    with matplotlib.rc_context(_STYLE):
        yield


def figure(width: float, height: float) -> Figure:
    """A figure of its own, in inches: no global state, so plots can be made in any thread."""
    return Figure(figsize=(width, height), layout="constrained")


def render(drawn: Figure, kind: Kind) -> bytes:
    """The figure as a file; equal figures give equal bytes."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    drawn.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()
