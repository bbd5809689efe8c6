"""One look for all charts: readable in print, on a screen and by the colour-blind."""

import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

Kind = Literal["png", "svg"]
KINDS: tuple[Kind, ...] = ("svg", "png")

# Okabe & Ito (2008): eight colours that all common kinds of colour vision tell apart; yellow is left out on white, and
# three are darkened, so that text in them can be read.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b5508a", "#b07800", "#2f8fc4", "#444b54")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
RIGHT, WRONG, PAPER = "#0072b2", "#d55e00", "#6b3fa0"
INK, FAINT, GRID, BACK = "#222222", "#6a7480", "#e3e3e3", "#ffffff"
STATUS = {"finished": "#00754f", "stopped": "#8a5a00", "failed": "#b3400a"}  # of a trial
HEAT = tuple(  # from the worst to the best
    "#" + "".join(f"{round(low + (high - low) * level / 10):02x}" for low, high in ((201, 31), (191, 58), (227, 115)))
    for level in range(11)
)
WIDTH = 5.2  # inches of a chart that shares a row with another
TIP = "tip: "

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.dpi": 200,
    "figure.facecolor": BACK,
    "svg.hashsalt": "pipeline",  # equal figures give equal files
    "svg.fonttype": "none",  # text stays text: a page shows it in its own font
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $5$
}


@contextmanager
def chart(width: float, height: float) -> Iterator[Figure]:
    """A figure of its own, in inches, with the charts' settings within the block only: no global state, so charts can
    be made in any thread."""
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def look(number: int) -> tuple[str, str]:
    """Colour and marker of a series: 56 different pairs."""
    return PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]


def render(drawn: Figure, kind: Kind) -> bytes:
    """The figure as a file; equal figures give equal bytes."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in another script
        drawn.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def in_both_kinds(charts: Mapping[str, Callable[..., bytes]]) -> dict[str, bytes]:
    """Every chart as SVG and as PNG, by the name of its file."""
    return {f"{name}.{kind}": draw(kind=kind) for name, draw in charts.items() for kind in KINDS}


def tip(artist: Artist, text: str) -> None:
    """What a page shows where the pointer rests on a mark; a PNG has none."""
    artist.set_gid(TIP + clean(text))


def dot(axes: Axes, x: float, y: float, text: str, colour: str = PALETTE[0], marker: str = "o", **more: Any) -> None:
    """A mark that says what it is."""
    tip(axes.plot(x, y, color=colour, marker=marker, **more)[0], text)


def clean(text: str) -> str:
    """Without what no SVG may hold."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def short(text: str, most: int) -> str:
    """At most so many letters, the middle left out: long names often differ at their ends."""
    text = clean(text)
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - half]}…{text[-half:]}"


def percent_text(value: float, interval: float | None = None) -> str:
    return f"{100 * value:.2f}" + (f" ± {100 * interval:.2f} %" if interval else " %")


def percent_axis(axes: Axes, which: Literal["x", "y"] = "y") -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")


def number_axis(axes: Axes, log: bool, integer: bool, low: float, high: float) -> None:
    """The x axis of a searched number."""
    if log:
        axes.set_xscale("log")
        room = max((high / low) ** 0.04, 1.1)
        axes.set_xlim(low / room, high * room)
        decades = math.log10(high / low)
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        room = 0.04 * (high - low) or 0.5
        axes.set_xlim(low - room, high + room)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=integer))


def legend(drawn: Figure) -> None:
    """Above the figure, of what has a label, in as many columns of three as it is wide enough for."""
    if not any(axes.get_legend_handles_labels()[0] for axes in drawn.axes):
        return
    for columns in (3, 2, 1):
        made = drawn.legend(loc="outside upper left", ncols=columns, borderpad=0)
        if columns == 1 or made.get_window_extent().width <= drawn.bbox.width:
            return
        made.remove()


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Least and greatest of finite shares with some room, within [0, 1]; these two of none."""
    kept = [value for value in values if math.isfinite(value)]
    if not kept:
        return 0.0, 1.0
    room = 0.06 * (max(kept) - min(kept)) or 0.05 * max(abs(max(kept)), 1e-9)
    return max(0.0, min(kept) - room), min(1.0, max(kept) + room)


def apart(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """``heights`` moved so that neighbours are at least ``gap`` apart and none is above ``top``, in their order."""
    placed = [float(height) for height in heights]
    limit = top
    for index in sorted(range(len(placed)), key=lambda i: -placed[i]):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - gap
    return placed
