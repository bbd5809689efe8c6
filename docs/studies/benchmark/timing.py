"""Sides measured in turn, so that what else the machine does reaches all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from docs.studies.benchmark.rows import Times

Sides = Mapping[str, Callable[[], float]]


def interleaved(sides: Sides, repetitions: int, warm_up: int = 1) -> Times:
    """Every side's own figure, once a repetition, after ``warm_up`` rounds that do not count.

    Each repetition begins with another side.
    """
    names = list(sides)
    found: Times = {name: [] for name in names}
    for number in range(warm_up + repetitions):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            figure = sides[name]()
            if number >= warm_up:
                found[name].append(figure)
    return found


def seconds(function: Callable[[], object], times: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one call, on average over ``times``."""
    began = clock()
    for _ in range(times):
        function()
    return (clock() - began) / times


def repeatedly(
    function: Callable[[], object], times: int, clock: Callable[[], float] = time.perf_counter
) -> Iterator[float]:
    """Seconds a call, over ``times`` calls, whenever asked: what a side that lives apart yields.

    With ``clock=time.process_time`` it is CPU time: the same for one thread, and blind to what else the machine does.
    """
    while True:
        yield seconds(function, times, clock)
