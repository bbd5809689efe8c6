"""Search spaces: what a campaign may choose, the values chosen, as ``jobs.train`` takes them, and what to try next.

What is tried next is a pure function of the seed, the trial's number and what is known, so that nothing is kept.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import BaseTrial, FixedTrial, FrozenTrial, TrialState, create_trial
from pydantic import model_validator

from pipeline.config import Section, literal, validate
from pipeline.config_kinds import Real
from pipeline.errors import PipelineError

Values = dict[str, Any]  # chosen values by dotted key
Kind = Literal["tpe", "random"]
# Optuna's own choice, 24 candidates and a tenth of the trials as the good ones, is one for hundreds of trials: with
# some dozens it is no better than random search (tests/search/test_tpe.py).
CANDIDATES, GOOD = 64, 0.2
DRAWS = 32  # of values that were tried before, until they are drawn at random, and of those, until none are left


class Dimension(Section):
    """One searched key: a range or a list of choices, and the choices of other keys under which it exists."""

    low: Real | None = None
    high: Real | None = None
    log: bool = False  # uniform in the logarithm
    integer: bool = False
    choices: list[Any] | None = None
    when: dict[str, Any] = {}

    @model_validator(mode="after")
    def _whole(self) -> Dimension:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.integer:
                raise ValueError("give choices, or low and high, not both")
            if not self.choices:
                raise ValueError("choices is empty")
        elif self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        elif not self.low < self.high:
            raise ValueError("low must be below high")
        elif self.log and self.low <= 0:
            raise ValueError("a logarithmic range begins above 0")
        elif self.integer and (self.low % 1 or self.high % 1):
            raise ValueError("an integer range has whole ends")
        return self

    def suggest(self, trial: BaseTrial, key: str) -> Any:
        """The value that Optuna's sampler wants for ``key``."""
        if self.choices is not None:
            return json.loads(trial.suggest_categorical(key, [_code(choice) for choice in self.choices]))
        assert self.low is not None and self.high is not None
        if self.integer:
            return trial.suggest_int(key, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(key, self.low, self.high, log=self.log)

    def encode(self, value: Any) -> Any:
        """As Optuna holds it: choices may be lists or null, which it does not take."""
        return value if self.choices is None else _code(self._choices_like(value)[0])

    def holds(self, value: Any) -> bool:
        if self.choices is not None:
            return bool(self._choices_like(value))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        assert self.low is not None and self.high is not None
        return self.low <= value <= self.high and not (self.integer and value % 1)

    def _choices_like(self, value: Any) -> list[Any]:
        """Those equal to ``value``: 10 is 10.0, and true is not 1."""
        truth = isinstance(value, bool)
        return [choice for choice in self.choices or [] if choice == value and isinstance(choice, bool) == truth]

    def __str__(self) -> str:
        if self.choices is not None:
            return "one of " + ", ".join(map(str, self.choices))
        kind = "".join([" on a log scale" if self.log else "", ", whole numbers" if self.integer else ""])
        return f"from {self.low:g} to {self.high:g}{kind}"


class Space:
    """Dimensions by dotted key of ``jobs.train``, in an order in which conditions look back only."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        if not described:
            raise PipelineError("space is empty: name at least one key of jobs.train to search over")
        self.dimensions: dict[str, Dimension] = {}
        for key, entry in described.items():
            if not isinstance(entry, dict):
                raise PipelineError(f"space.{key}={entry!r}: give {{low: .., high: ..}} or {{choices: [..]}}")
            try:
                dimension = validate(Dimension, entry)
            except PipelineError as error:
                raise PipelineError(f"space.{key}: {str(error).removeprefix(f'{entry!r}: ')}") from error
            for other in dimension.when:
                if other not in self.dimensions:
                    raise PipelineError(f"space.{key}.when.{other}: a condition names a key of the space above its own")
            self.dimensions[key] = dimension

    def active(self, key: str, values: Mapping[str, Any]) -> bool:
        """Whether ``key`` exists beside the ``values`` of the keys above it."""
        return meets(values, self.dimensions[key].when)

    def check(self, values: Mapping[str, Any], where: str) -> None:
        """Refuse given values of the wrong kind. A number outside its range may be tried (a coefficient of 0)."""
        for key, value in values.items():
            if key not in self.dimensions:
                raise PipelineError(f"{where}: {key} is no key of the space")
            if not self.active(key, values):
                raise PipelineError(f"{where}: {key} does not exist beside the other values")
            dimension = self.dimensions[key]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (dimension.holds(value) or (number and dimension.choices is None)):
                raise PipelineError(f"{where}: {key}={value} lies outside the space ({dimension})")


def meets(values: Mapping[str, Any], condition: Mapping[str, Any]) -> bool:
    """Whether every key of ``condition`` has its value, or one of its values."""
    return all(
        key in values and values[key] in (wanted if isinstance(wanted, list) else [wanted])
        for key, wanted in condition.items()
    )


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """``key=value`` as the command line has them."""
    return [f"{key}={literal(value)}" for key, value in values.items()]


def _code(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@dataclass(frozen=True)
class Known:
    """A trial that began before: its values, and what came of it."""

    values: Values
    score: float | None  # None: it still runs
    curve: tuple[tuple[int, float], ...] = ()  # validation accuracy by step
    stopped: bool = False  # before its end, by the scheduler


def propose(
    space: Space, kind: Kind, seed: int, number: int, known: Sequence[Known], startup: int = 8
) -> Values | None:
    """Values of trial ``number`` that no trial had: by Optuna's tree-structured Parzen estimator, or at random.

    Args:
        startup: so many trials are known before TPE has something to go by; until then it draws at random too.
        known: all trials before. One that failed counts with its score of 0: the search keeps away from there.

    Returns:
        None where no new values are found in ``DRAWS`` draws of the sampler and as many at random.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    tried = [trial.values for trial in known]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "`gamma`", FutureWarning)
        study = optuna.create_study(direction="maximize", sampler=_sampler(kind, _own_seed(seed, number), startup))
        study.add_trials([_frozen(space, trial) for trial in known])
        for sampler in (study.sampler, RandomSampler(seed=_own_seed(seed, number, 1))):
            study.sampler = sampler
            for _ in range(DRAWS):  # what was asked for counts as running: TPE keeps away from it
                values = _drawn(space, study.ask())
                if values not in tried:
                    return values
    return None


def _drawn(space: Space, trial: BaseTrial) -> Values:
    values: Values = {}
    for key, dimension in space.dimensions.items():
        if space.active(key, values):
            values[key] = dimension.suggest(trial, key)
    return values


def _own_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _sampler(kind: Kind, seed: int, startup: int) -> BaseSampler:
    if kind == "random":
        return RandomSampler(seed=seed)
    return TPESampler(
        seed=seed,
        n_startup_trials=startup,
        n_ei_candidates=CANDIDATES,
        gamma=lambda trials: max(2, math.ceil(GOOD * trials)),
        multivariate=True,  # keys together, as a rate and its method
        group=True,  # and apart where they do not exist together
        constant_liar=True,  # keeps away from trials that still run
    )


def _frozen(space: Space, trial: Known) -> FrozenTrial:
    chosen = {key: space.dimensions[key] for key, value in trial.values.items() if space.dimensions[key].holds(value)}
    fixed = FixedTrial({key: dimension.encode(trial.values[key]) for key, dimension in chosen.items()})
    for key, dimension in chosen.items():
        dimension.suggest(fixed, key)
    ended = TrialState.PRUNED if trial.stopped else TrialState.COMPLETE
    return create_trial(
        state=TrialState.RUNNING if trial.score is None else ended,
        value=None if trial.stopped else trial.score,
        params=fixed.params,
        distributions=fixed.distributions,
        intermediate_values=dict(trial.curve),
    )
