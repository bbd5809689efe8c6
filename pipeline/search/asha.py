"""Ray Tune's asynchronous successive halving, taught to go on where a killed campaign was."""

import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from pipeline.search.ledger import Record
from pipeline.search.trial import ACCURACY, STEP

BRACKETS = {"asha": 1, "hyperband": 3}


class ASHA(FIFOScheduler):
    """Asynchronous successive halving (Li et al. 2018) over steps, in one bracket or several (HyperBand).

    A trial's bracket is a function of its number, and trials are known by their runs, so that the state can be made
    again from the ledger: :meth:`replay`. (Tune's own snapshots have no state of a scheduler.)

    Args:
        spared: so many of the first trials are never stopped: the others are compared with them.
    """

    def __init__(self, kind: str, steps: int, grace: int, factor: int, seed: int = 0, spared: int = 0) -> None:
        super().__init__()
        self._steps, self._seed, self._spared = steps, seed, spared
        brackets = range(BRACKETS[kind])
        rungs = np.array([max(0, int(math.log(steps / grace) / math.log(factor) - s + 1)) for s in brackets])
        shares = np.exp(rungs - rungs.max(initial=0))
        self._shares = shares / shares.sum()
        self._brackets = [
            AsyncHyperBandScheduler(
                STEP, ACCURACY, "max", max_t=steps, grace_period=min(grace * factor**s, steps), reduction_factor=factor
            )
            for s in brackets
        ]

    def goes_on(self, number: int, run: str, step: int, accuracy: float) -> bool:
        """Note a validation, and say whether its trial is among the best at this step. The last step stops nobody."""
        if step >= self._steps:
            return True
        bracket = self._brackets[self._bracket(number)]
        trial, nobody = cast(Trial, SimpleNamespace(trial_id=run)), cast(Any, None)
        bracket.on_trial_add(nobody, trial)
        decision = bracket.on_trial_result(nobody, trial, {STEP: step, ACCURACY: accuracy})
        return bool(decision == TrialScheduler.CONTINUE) or number < self._spared

    def replay(self, record: Record) -> bool:
        """Note the validations of an earlier trial; whether it would go on."""
        return all([self.goes_on(record.number, record.run, *point) for point in record.curve])

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if ACCURACY not in result:
            return str(TrialScheduler.CONTINUE)
        on = self.goes_on(trial.config["number"], trial.config["name"], result[STEP], result[ACCURACY])
        return str(TrialScheduler.CONTINUE if on else TrialScheduler.STOP)

    def _bracket(self, number: int) -> int:
        return int(np.random.default_rng([self._seed, number]).choice(len(self._shares), p=self._shares))
