"""Population-based training (Jaderberg et al. 2017): values that change while the trials train.

Not Ray Tune's own: that takes members as they come and draws from one stream of random numbers, so that a campaign
would end otherwise each time, and what a killed one did would be lost with its scheduler.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pipeline import store
from pipeline.errors import PipelineError
from pipeline.search.campaign import Campaign
from pipeline.search.ledger import Ledger, Record
from pipeline.search.searchers import SearchTrials
from pipeline.search.space import Space, Values
from pipeline.training.checkpoint import STATE
from pipeline.training.runs import START, checkpoints

FACTORS = (0.8, 1.2)  # of a number that is perturbed, as in the paper


class PBT(SearchTrials):
    """As many members as the campaign has trials, trained in generations of ``scheduler.grace`` steps.

    At the end of a generation the worst 1/factor are replaced by copies of the best 1/factor: weights, moments and
    position, with the values perturbed (exploit and explore, section 3 of the paper). Members that failed are replaced
    as the worst. The ledger holds all that matters, so that an interrupted campaign goes on in the same generation.
    """

    def __init__(
        self, campaign: Campaign, ledger: Ledger, ended: Callable[[Record], None] = lambda record: None
    ) -> None:
        self.size, factor = campaign.config.trials, campaign.config.scheduler.factor
        if self.size < factor:
            raise PipelineError(f"trials={self.size}: a population has at least scheduler.factor={factor} members")
        if not any(perturbable(campaign.space, key) for key in campaign.space.dimensions):
            raise PipelineError("scheduler.kind=pbt perturbs numbers: the space has none outside the backbone")
        super().__init__(campaign, ledger, ended)
        if self.running():  # whoever was killed between a checkpoint and the ledger is at the end of its generation too
            ledger.put(*map(self.refreshed, self.running()))

    def open(self) -> bool:
        return self.new() is not None or bool(self.running())

    def waits(self) -> bool:
        return bool(self._out)

    def until(self) -> int:
        """The end of the generation that the members are in; 0: the last one, which ends by itself."""
        every, steps = self.campaign.grace, self.campaign.train.steps
        behind = min(record.step for record in self.running())
        end = every * (behind // every + 1)
        return end if end < steps else 0

    def following(self) -> Record | None:
        """One of the first generation, or a member that has not yet trained in this one; where all have, the next
        generation is made first."""
        if (record := self.new()) is not None:
            return record
        alive = self.running()
        if not alive:
            return None
        if not self._out and len({record.step for record in alive}) == 1 and alive[0].step:
            self._replace(alive[0].step)
            alive = self.running()
        end = self.until() or math.inf
        waiting = [record for record in alive if record.run not in self._out and record.step < end]
        return min(waiting, key=lambda record: (record.step, record.number), default=None)

    def stopped(self, record: Record, step: int) -> None:
        """A member at the end of its generation: it is not over."""
        self._out.discard(record.run)
        self.ledger.put(record)

    def _replace(self, step: int) -> None:
        """The worst by copies of the best; once a generation, in one write."""
        records, factor = self.known(), self.campaign.config.scheduler.factor
        if any(record.parent and record.began_at == step for record in records):
            return
        order = sorted(self.running(), key=lambda record: (-record.curve[-1][1], record.number))
        count = self.size // factor
        lost = max(0, count - (self.size - len(order)))  # members that failed make room too
        best, worst = order[:count], order[len(order) - min(lost, len(order) - 1) :]
        copies: list[Record] = []
        for place in range(self.size - len(order) + len(worst)):
            rng = np.random.default_rng([self.campaign.config.search.seed, step, place])
            parent, number = best[int(rng.integers(len(best)))], len(records) + place
            run = f"{self.campaign.name}-{number:04d}"
            _copy(self.campaign, parent, run)
            values = perturbed(self.campaign.space, parent.values, rng)
            copies.append(
                Record(number, run, values, curve=parent.curve, began=time.time(), parent=parent.run, began_at=step)
            )
        reason = f"among the worst at step {step:,}: replaced by a copy of a better one"
        replaced = [replace(record, status="stopped", reason=reason, ended=time.time()) for record in worst]
        self.ledger.put(*copies, *replaced)
        for record in replaced:
            self.ended(record)


def perturbable(space: Space, key: str) -> bool:
    """Whether a copy may have another value than its parent: numbers that are not the network's."""
    return space.dimensions[key].choices is None and not key.startswith("backbone.")


def perturbed(space: Space, values: Values, rng: np.random.Generator) -> Values:
    """Every number times 0.8 or 1.2, within its range; a whole number moves by at least 1."""
    new = dict(values)
    for key, value in values.items():
        if not perturbable(space, key):
            continue
        low, high = space.dimensions[key].low, space.dimensions[key].high
        assert low is not None and high is not None
        factor = FACTORS[int(rng.integers(2))]
        moved = value * factor
        if space.dimensions[key].integer:
            moved = min(math.floor(moved), value - 1) if factor < 1 else max(math.ceil(moved), value + 1)
        moved = min(max(moved, low), high)
        new[key] = (int(moved) if space.dimensions[key].integer else float(moved)) if value else value
    return new


def _copy(campaign: Campaign, parent: Record, run: str) -> None:
    """The parent's last checkpoint, as what the run begins with: the parent may delete its own."""
    source, target = checkpoints(store.join(campaign.uri, parent.run))[-1], store.join(campaign.uri, run, START)
    for name in sorted(store.list_names(source), key=lambda name: name == STATE):  # the file that makes it whole
        store.write_bytes(store.join(target, name), store.read_bytes(store.join(source, name)))
