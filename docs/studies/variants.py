"""Several ways to train on the same data, each over the same seeds: accuracies, and steps to the same validation."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from docs.studies.reproduction import form
from pipeline.evaluation.statistics import estimate, paired
from pipeline.tables import markdown_table, percent

Run = dict[str, Any]
NEARLY = 0.9  # of the level


def markdown(files: Sequence[Path]) -> str:
    """A row for every variant among ``files``, which ``jobs.evaluate record=`` wrote, and the commands.

    Intervals are Student's over the seeds, differences those to the variant that is first in the table, seed by seed.
    Of the runs with one seed, the level is the best validation of the run whose best is worst, and the steps to it end
    with the first validation that is no lower; so are those to nine tenths of it.
    """
    runs = sorted((json.loads(file.read_text()) for file in files), key=lambda run: (form(run), run["seed"]))
    groups = {name: [run for run in runs if form(run) == name] for name in map(form, runs)}
    first = next(iter(groups.values()))
    seeds = [run["seed"] for run in first]
    if any([run["seed"] for run in group] != seeds for group in groups.values()):
        raise ValueError(f"{files[0].parent}: every variant must be there with the same seeds")
    levels = {seed: min(_best(run) for run in runs if run["seed"] == seed) for seed in seeds}
    settings = [f"{result['way']}-way {result['shot']}-shot" for result in first[0]["results"]]
    rows = []
    for name, group in groups.items():
        accuracies = [_accuracies(group, place) for place in range(len(settings))]
        cells = [percent(found.mean, found.interval) for found in (estimate(a, student=True) for a in accuracies)]
        if group is not first:
            for place, mine in enumerate(accuracies):
                found = paired(_accuracies(first, place), mine)
                cells[place] += f"; {100 * found.difference:+.2f} ({100 * found.low:+.2f} to {100 * found.high:+.2f})"
        steps = ["; ".join(f"{_first(run, part * levels[run['seed']]):,}" for run in group) for part in (NEARLY, 1)]
        rows.append([name, *cells, "; ".join(f"{100 * _best(run):.1f}" for run in group), *steps])
    level = "; ".join(f"{100 * levels[seed]:.1f}" for seed in seeds)
    nearly = "; ".join(f"{100 * NEARLY * levels[seed]:.1f}" for seed in seeds)
    reach = [f"steps to {nearly} %", f"steps to {level} %"]
    header = ["variant", *(f"{s}, %" for s in settings), "best in validation, %", *reach]
    made = "\n".join(f"- `{run['command']}` ({run['code']})" for run in runs)
    said = (
        f"Means of seeds {', '.join(map(str, seeds))} on the test classes with 95 % intervals over the seeds; after a "
        "semicolon the difference to the first row, seed by seed. Steps and validation: of each seed."
    )
    return f"{markdown_table(header, rows)}\n\n{said}\n\n{made}"


def _accuracies(group: Sequence[Run], place: int) -> np.ndarray:
    return np.asarray([run["results"][place]["accuracy"] for run in group])


def _best(run: Run) -> float:
    return max(float(accuracy) for _, accuracy, _ in run["curve"])


def _first(run: Run, level: float) -> int:
    return next(int(step) for step, accuracy, _ in run["curve"] if accuracy >= level)
