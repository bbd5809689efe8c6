"""What to try next: a pure function of the seed, the trial's number and what is known, so that nothing is kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipeline.search.space import Space, Values

Kind = Literal["tpe", "random"]
# Optuna's own choice, 24 candidates and a tenth of the trials as the good ones, is one for hundreds of trials: with
# some dozens it is no better than random search (tests/search/test_tpe.py).
CANDIDATES, GOOD = 64, 0.2


@dataclass(frozen=True)
class Known:
    """A trial that began before: its values, and what came of it."""

    values: Values
    score: float | None  # None: it still runs
    curve: tuple[tuple[int, float], ...] = ()  # validation accuracy by step
    stopped: bool = False  # before its end, by the scheduler


def propose(space: Space, kind: Kind, seed: int, number: int, known: Sequence[Known], startup: int = 8) -> Values:
    """Values of trial ``number``: by Optuna's tree-structured Parzen estimator, or at random.

    Args:
        startup: the first trials that TPE draws at random too.
        known: all trials before. One that failed counts with its score of 0: the search keeps away from there.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "`gamma`", FutureWarning)
        study = optuna.create_study(direction="maximize", sampler=_sampler(kind, seed, number, startup))
        study.add_trials([_frozen(space, trial) for trial in known])
        trial = study.ask()
        values: Values = {}
        for key, dimension in space.dimensions.items():
            if space.active(key, values):
                values[key] = dimension.suggest(trial, key)
    return values


def _sampler(kind: Kind, seed: int, number: int, startup: int) -> BaseSampler:
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    if kind == "random":
        return RandomSampler(seed=own)
    return TPESampler(
        seed=own,
        n_startup_trials=startup,
        n_ei_candidates=CANDIDATES,
        gamma=lambda trials: max(2, math.ceil(GOOD * trials)),
        multivariate=True,  # keys together, as a rate and its method
        group=True,  # and apart where they do not exist together
        constant_liar=True,  # keeps away from trials that still run
    )


def _frozen(space: Space, trial: Known) -> FrozenTrial:
    chosen = {key: space.dimensions[key] for key, value in trial.values.items() if space.dimensions[key].holds(value)}
    described: dict[str, Any] = {
        "params": {key: dimension.encode(trial.values[key]) for key, dimension in chosen.items()},
        "distributions": {key: dimension.distribution() for key, dimension in chosen.items()},
        "intermediate_values": dict(trial.curve),
    }
    if trial.score is None:
        return create_trial(state=TrialState.RUNNING, **described)
    if trial.stopped:
        return create_trial(state=TrialState.PRUNED, **described)
    return create_trial(state=TrialState.COMPLETE, value=trial.score, **described)
