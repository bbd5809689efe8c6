"""At an equal budget the estimator's best is better than random search's best, over repeated seeds."""

from __future__ import annotations

import math

import numpy as np

from pipeline.evaluation.statistics import paired
from pipeline.search.space import Kind, Known, Space, Values, propose

SPACE = Space(
    {
        "method": {"choices": ["metric", "gradient"]},
        "scale": {"low": 0.1, "high": 100, "log": True, "when": {"method": "metric"}},
        "inner_lr": {"low": 1e-4, "high": 10, "log": True, "when": {"method": "gradient"}},
        "inner_steps": {"low": 1, "high": 8, "integer": True, "when": {"method": "gradient"}},
        "lr": {"low": 1e-5, "high": 1e-1, "log": True},
    }
)
TRIALS, SEEDS = 40, 12


def surrogate(values: Values) -> float:
    """An accuracy over the space: a narrow hill in the logarithms, diverging where the inner rate is too large."""
    off = (math.log10(values["lr"]) + 2.7) ** 2
    if values["method"] == "metric":
        return 0.92 * math.exp(-0.5 * off - 0.8 * (math.log10(values["scale"]) - 1.0) ** 2)
    if values["inner_lr"] > 3:
        return 0.0
    steps = 0.02 * (values["inner_steps"] - 5) ** 2
    return 0.97 * math.exp(-0.5 * off - 0.8 * (math.log10(values["inner_lr"]) + 0.6) ** 2 - steps)


def best(kind: Kind, seed: int) -> float:
    known: list[Known] = []
    for number in range(TRIALS):
        values = propose(SPACE, kind, seed, number, known, startup=8)
        known.append(Known(values, surrogate(values)))
    return max(trial.score or 0.0 for trial in known)


def test_the_estimator_beats_random_search():
    bests = {kind: np.array([best(kind, seed) for seed in range(SEEDS)]) for kind in ("tpe", "random")}
    for kind, found in bests.items():
        print(
            f"{kind:>6}: best of {TRIALS} trials, mean over {SEEDS} seeds {found.mean():.4f}, worst {found.min():.4f}"
        )
    found = paired(bests["random"], bests["tpe"])
    print(f"difference {found.difference:.4f} ({found.low:.4f} … {found.high:.4f})")
    assert found.difference > 0.01 and found.better_by(0.0)  # the whole interval over the seeds
