"""Which trials go on: Ray Tune's asynchronous successive halving, taught to go on where a killed campaign was."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from pipeline.search.ledger import Record
from pipeline.search.trial import ACCURACY, STEP

BRACKETS = {"asha": 1, "hyperband": 3}


class Halving(AsyncHyperBandScheduler):
    """Asynchronous successive halving (Li et al. 2018) over steps, in one bracket or several (HyperBand).

    A trial's bracket is a function of its number, and trials are known by their runs, so that the state can be made
    again from the ledger: :meth:`replay`.
    """

    def __init__(self, kind: str, steps: int, grace: int, factor: int, seed: int = 0, spared: int = 0) -> None:
        super().__init__(
            STEP, ACCURACY, "max", max_t=steps, grace_period=grace, reduction_factor=factor, brackets=BRACKETS[kind]
        )
        self._seed, self._spared = seed, spared

    def goes_on(self, number: int, run: str, step: int, accuracy: float) -> bool:
        """Note a validation, and say whether its trial is among the best at this step.

        The last step stops nobody. The first ``spared`` trials are never stopped: the others are compared with them.
        """
        if step >= self._max_t:
            return True
        bracket = self._brackets[self._bracket(number)]
        trial: Any = SimpleNamespace(trial_id=run)
        best = bool(bracket.on_result(trial, step, accuracy) == TrialScheduler.CONTINUE)
        return best or number < self._spared

    def replay(self, records: Iterable[Record]) -> list[str]:
        """Note the validations of earlier trials; the runs among them that do not go on."""
        ended = []
        for record in records:
            if not all([self.goes_on(record.number, record.run, *point) for point in record.curve]):
                ended.append(record.run)
        return ended

    def _bracket(self, number: int) -> int:
        rungs = np.array([len(bracket._rungs) for bracket in self._brackets], dtype=float)
        shares = np.exp(rungs - rungs.max())
        return int(np.random.default_rng([self._seed, number]).choice(len(rungs), p=shares / shares.sum()))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        pass

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        pass

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        pass

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if ACCURACY not in result:
            return str(TrialScheduler.CONTINUE)
        on = self.goes_on(trial.config["number"], trial.config["name"], result[STEP], result[ACCURACY])
        return str(TrialScheduler.CONTINUE if on else TrialScheduler.STOP)
