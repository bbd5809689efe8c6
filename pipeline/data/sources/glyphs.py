"""Glyphs: an endless alphabet of handwritten-looking characters, drawn from seeded stroke programs.

A class is a program of one to four pen strokes: where the pen starts (often on an earlier stroke), its heading, its
length and how it turns on its way (straight, bow, S, loop, corner). A drawing is the program performed by a shaky hand:
every control point trembles, and the whole is slanted, turned, stretched, moved and drawn with a pen of its own width.

Every number is a pure function of (seed, class, drawing). Arithmetic up to the coordinates uses only correctly rounded
operations, coordinates are rounded to 1/16 pixel and everything after is integer: all machines draw equal pixels.
"""

from collections.abc import Iterator

import numpy as np

from pipeline.data.philox import key_of, uniforms
from pipeline.data.sources import splits
from pipeline.data.sources.arrays import content_digests
from pipeline.data.sources.base import Chunk, Plan, Report, Source
from pipeline.errors import PipelineError

STROKES = 4  # at most, in a class
POINTS = 5  # control points of a stroke
SAMPLES = 16  # curve points between two control points
GRID = 16  # sub-pixel steps
AWAY = 9.0

# Cumulative probabilities, for comparison with one uniform number.
_STROKE_COUNT = np.array([0.10, 0.45, 0.80])  # 1, 2, 3, else 4 strokes
_SHAPE = np.array([0.28, 0.52, 0.68, 0.84])  # line, bow, S, loop, else corner
HAND = 7 + 2 * STROKES + 4 * STROKES * POINTS  # random numbers of a drawing
LINE, BOW, ESS, LOOP, CORNER = range(5)

# The hand: half the range of every deviation, in units of the glyph's height.
TREMBLE = 0.024  # of a control point
PLACE = 0.028  # of a stroke
TURN = 0.13  # tangent of half the angle: 0.13 is 15 degrees
SLANT = 0.22
STRETCH = 0.20
SHIFT = 0.07
PEN = (0.026, 0.052)  # half the width of the pen


def draw_glyphs(
    classes: range | np.ndarray, per_class: int = 20, size: int = 28, seed: int = 0, first_drawing: int = 0
) -> np.ndarray:
    """Draw ``per_class`` drawings of every class in ``classes`` (numbers): uint8 [classes, per_class, 1, size, size].

    Ink is 255 on 0. Neither the other classes nor the number of drawings changes a drawing.
    """
    numbers = np.asarray(classes, dtype=np.int64)
    programs = stroke_programs(numbers, seed)
    drawings = numbers[:, None] * 2**20 + first_drawing + np.arange(per_class)
    out = np.empty((len(numbers), per_class, 1, size, size), dtype=np.uint8)
    step = max(1, 256 // per_class)  # enough drawings for long inner loops, few enough for the cache
    for start in range(0, len(numbers), step):
        part = slice(start, start + step)
        points = np.repeat(programs[part], per_class, axis=0)
        hand = uniforms(key_of("glyph drawing", seed), drawings[part].reshape(-1), HAND)
        curves = _curves(_perform(points, hand[:, 1:]))
        pen = PEN[0] + (PEN[1] - PEN[0]) * hand[:, 0]
        out[part] = _ink(curves, pen, size).reshape(-1, per_class, 1, size, size)
    return out


def stroke_programs(classes: np.ndarray, seed: int) -> np.ndarray:
    """Control points float64 [classes, STROKES, POINTS, 2] (x, y) in the unit square.

    The strokes that a class does not have lie far away from the page.
    """
    u = uniforms(key_of("glyph class", seed), classes, 1 + STROKES * 12)
    count = 1 + np.searchsorted(_STROKE_COUNT, u[:, 0], side="right")
    points = np.empty((len(classes), STROKES, POINTS, 2))
    for stroke in range(STROKES):
        points[:, stroke] = _stroke(points, stroke, count, u[:, 1 + 12 * stroke : 13 + 12 * stroke])
    absent = np.arange(STROKES) >= count[:, None]
    points[absent] = np.repeat(points[:, :1], STROKES, axis=1)[absent]
    points = _fill_square(points)
    points[absent] = AWAY
    return points


def _stroke(points: np.ndarray, stroke: int, count: np.ndarray, u: np.ndarray) -> np.ndarray:
    """One stroke of every class, [classes, POINTS, 2]: a walk that starts at a place and turns at every step."""
    rows = np.arange(len(u))
    place = u[:, 0:2].copy()
    if stroke:  # two strokes of three hang on a control point of an earlier one
        host = np.minimum((u[:, 2] * stroke).astype(np.int64), count - 1)
        joint = points[rows, host, (u[:, 3] * POINTS).astype(np.int64)]
        place = np.where(u[:, 4:5] < 0.66, joint, place)
    shape = np.searchsorted(_SHAPE, u[:, 5], side="right")
    shape = np.where((count == 1) & (shape == LINE), ESS, shape)  # a single straight line is no character
    turn = np.choose(
        shape,
        [0.04 * (u[:, 6] - 0.5), 0.14 + 0.22 * u[:, 6], 0.22 + 0.25 * u[:, 6], 0.70 + 0.30 * u[:, 6], 0.9 + u[:, 6]],
    )
    turn = np.where(u[:, 7] < 0.5, turn, -turn)
    length = np.where(shape == LOOP, 0.18 + 0.20 * u[:, 8], 0.14 + 0.16 * u[:, 8])
    heading = np.stack(_rotation(2 * u[:, 9] - 1), axis=-1) * np.where(u[:, 10] < 0.5, 1.0, -1.0)[:, None]
    walk = np.empty((len(u), POINTS, 2))
    walk[:, 0] = place
    for step in range(1, POINTS):
        walk[:, step] = walk[:, step - 1] + length[:, None] * heading
        bend = turn
        if step >= POINTS // 2:
            bend = np.where(shape == ESS, -turn, bend)
        if step != POINTS // 2:
            bend = np.where(shape == CORNER, 0.0, bend)
        cos, sin = _rotation(bend)
        x, y = heading[:, 0], heading[:, 1]
        heading = np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)
    return walk


def _rotation(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the angle whose half has the tangent ``t``, without a library's sine."""
    square = t * t
    return (1 - square) / (1 + square), 2 * t / (1 + square)


def _fill_square(points: np.ndarray) -> np.ndarray:
    """Scale every glyph, keeping most of its proportions, to the middle of the unit square."""
    low, high = points.min(axis=(1, 2)), points.max(axis=(1, 2))
    extent = np.maximum(high - low, 1e-6)
    scale = 0.66 / np.maximum(extent, 0.6 * extent.max(axis=1, keepdims=True))
    middle = (low + high) / 2
    return 0.5 + (points - middle[:, None, None]) * scale[:, None, None]


def _perform(points: np.ndarray, hand: np.ndarray) -> np.ndarray:
    """Programs [n, STROKES, POINTS, 2] as one hand draws them; ``hand`` float64 [n, HAND - 1] in [0, 1)."""
    whole, stroke, tremble = np.split(2 * hand - 1, [6, 6 + 2 * STROKES], axis=1)
    tremble = tremble.reshape(-1, 2, *points.shape[1:])
    moved = points - 0.5 + TREMBLE * (tremble[:, 0] + tremble[:, 1])  # triangular: mostly small
    moved = moved + PLACE * stroke.reshape(-1, STROKES, 1, 2)
    x, y = moved[..., 0], moved[..., 1]
    turn, slant, wide, tall, right, down = (column[:, None, None] for column in whole.T)
    x, y = x * (1 + STRETCH * wide), y * (1 + STRETCH * tall)
    x = x + SLANT * slant * y
    cos, sin = _rotation(TURN * turn)
    x, y = cos * x - sin * y, sin * x + cos * y
    return np.stack([x + SHIFT * right, y + SHIFT * down], axis=-1) + 0.5


def _basis() -> np.ndarray:
    """Catmull-Rom weights float64 [curve points, POINTS]: the curve passes through its control points."""
    weights = np.zeros(((POINTS - 1) * SAMPLES + 1, POINTS))
    for row in range(len(weights)):
        segment = min(row // SAMPLES, POINTS - 2)
        t = (row - segment * SAMPLES) / SAMPLES
        cubic = [
            (-t * t * t + 2 * t * t - t) / 2,
            (3 * t * t * t - 5 * t * t + 2) / 2,
            (-3 * t * t * t + 4 * t * t + t) / 2,
            (t * t * t - t * t) / 2,
        ]
        for offset, weight in enumerate(cubic, start=segment - 1):
            weights[row, min(max(offset, 0), POINTS - 1)] += weight
    return weights


_BASIS = _basis()


def _curves(points: np.ndarray) -> np.ndarray:
    """Points along all strokes, [n, STROKES * curve points, 2], from control points [n, STROKES, POINTS, 2]."""
    curve = np.zeros((*points.shape[:2], len(_BASIS), 2))
    for point in range(POINTS):  # products and sums one by one: a matrix product rounds as the machine likes
        curve += _BASIS[:, point, None] * points[:, :, None, point]
    return curve.reshape(len(points), -1, 2)


def _ink(curves: np.ndarray, pen: np.ndarray, size: int) -> np.ndarray:
    """Draw curves [n, points, 2] with pens of half-width ``pen`` [n]: uint8 [n, size, size]."""
    place = np.rint(curves * (size * GRID)).astype(np.int32)
    centre = np.arange(size, dtype=np.int32) * GRID + GRID // 2
    reach = 181  # 2 * 181^2 fits in 16 bits, and no pen is as wide
    far = np.minimum(np.abs(place[..., None] - centre), reach)  # [n, points, 2, size]
    square = np.ascontiguousarray((far * far).astype(np.uint16).transpose(1, 2, 3, 0))  # [points, 2, size, n]
    nearest = np.full((size, size, len(curves)), 65535, dtype=np.uint16)
    sums = np.empty_like(nearest)
    for x, y in square:
        np.add(y[:, None], x[None], out=sums)
        np.minimum(nearest, sums, out=nearest)
    # Ink falls from full to none over one pixel at the pen's edge.
    width = np.rint(pen * (size * GRID)).astype(np.int64)
    levels = np.arange(width.min(), width.max() + 1)
    distance = np.sqrt(np.arange(65536, dtype=np.float64))
    ramp = np.clip((levels[:, None] - distance) / GRID + 0.5, 0, 1)
    table = np.rint(255 * ramp).astype(np.uint8)
    return np.ascontiguousarray(table[width - width.min(), nearest].transpose(2, 0, 1))


class Glyphs(Source):
    """The embedded dataset: ``classes`` characters, split by ``seed`` as 2/3 train, 1/8 val and the rest test."""

    def __init__(self, classes: int = 480, per_class: int = 20, size: int = 28, seed: int = 0) -> None:
        if classes < 3 or per_class < 1 or not 8 <= size <= 256:
            raise PipelineError(
                f"data.source: classes={classes}, per_class={per_class}, size={size}; "
                "needed are 3 classes, 1 drawing a class and a size from 8 to 256"
            )
        self.classes, self.per_class, self.size, self.seed = classes, per_class, size, seed
        self.shape = (1, size, size)

    def plan(self, chunk_rows: int, report: Report) -> Plan:
        names = [f"glyph{number:05d}" for number in range(self.classes)]
        chosen = splits.by_fractions(names, {"train": 2 / 3, "val": 1 / 8, "test": 1 - 2 / 3 - 1 / 8}, self.seed)
        step = max(1, chunk_rows // self.per_class)
        orders = [range(start, min(start + step, self.classes)) for start in range(0, self.classes, step)]
        source = {"kind": "glyphs", "seed": self.seed}
        return Plan(names, chosen, orders, source, images=self.classes * self.per_class)

    def read(self, order: range, chunk_rows: int) -> Iterator[Chunk]:
        step = min(chunk_rows, self.per_class)
        for first in range(0, self.per_class, step) if step < self.per_class else [0]:
            count = min(step, self.per_class - first)
            images = draw_glyphs(order, count, self.size, self.seed, first).reshape(-1, *self.shape)
            classes = np.repeat(np.asarray(order, dtype=np.int32), count)
            names = [f"glyph{number:05d}/{first + row:05d}" for number in order for row in range(count)]
            yield Chunk(images, classes, names, content_digests(images))
