"""Which trial comes next: of the search, or of the finalists."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.errors import PipelineError
from pipeline.search.campaign import Campaign
from pipeline.search.ledger import Ledger, Record
from pipeline.search.propose import propose
from pipeline.training.runs import Run


class Plan:
    """Trials in their order: first those that were interrupted, then new ones. The ledger knows all that were given.

    Args:
        ended: told of every trial that came to its end.
    """

    def __init__(
        self, campaign: Campaign, ledger: Ledger, ended: Callable[[Record], None] = lambda record: None
    ) -> None:
        self.campaign, self.ledger, self.ended = campaign, ledger, ended
        self._interrupted = [record for record in self.known() if record.status == "running"]

    def known(self) -> list[Record]:
        raise NotImplementedError

    def new(self) -> Record | None:
        raise NotImplementedError

    def open(self) -> bool:
        """Whether there is a trial left."""
        return bool(self._interrupted) or self.new() is not None

    def next(self) -> tuple[Record, Run] | None:
        """The next trial that can be; one that asks for the impossible has failed before it began."""
        while True:
            record = self._interrupted.pop(0) if self._interrupted else self.new()
            if record is None:
                return None
            if (found := self.begin(record)) is not None:
                return found

    def begin(self, record: Record) -> tuple[Record, Run] | None:
        """The trial with its run; None: it asks for the impossible and has failed."""
        try:
            run = self.campaign.prepare(record.values, record.run, record.seed)
        except PipelineError as error:
            self.end(replace(record, status="failed", reason=str(error)))
            return None
        self.ledger.put(record)
        return record, run

    def waits(self) -> bool:
        """Whether there may be more once those that run are back."""
        return False

    def until(self) -> int:
        """The step at which a trial is stopped to be gone on with later; 0: none."""
        return 0

    def stopped(self, record: Record, step: int) -> None:
        """The scheduler stopped it at this validation."""
        self.end(replace(record, status="stopped", reason=f"not among the best at step {step:,}"))

    def end(self, record: Record) -> None:
        record = replace(record, ended=time.time())
        self.ledger.put(record)
        self.ended(record)


class SearchPlan(Plan):
    """First the given points, then what the search proposes from what is known."""

    def known(self) -> list[Record]:
        return self.ledger.search

    def new(self) -> Record | None:
        campaign, config, number = self.campaign, self.campaign.config, len(self.known())
        if number >= config.trials:
            return None
        if number < len(campaign.first):
            values = campaign.first[number]
        else:
            known = [record.known(campaign.train.validation.select) for record in self.known()]
            values = propose(
                campaign.space, config.search.kind, config.search.seed, number, known, config.search.startup
            )
        return Record(number, f"{campaign.name}-{number:04d}", values, began=time.time())


class FinalPlan(Plan):
    """Configurations, each with every seed: all of one seed, then all of the next."""

    def __init__(
        self,
        campaign: Campaign,
        ledger: Ledger,
        chosen: Sequence[Record],
        seeds: Sequence[int],
        ended: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self._pairs = [(record, seed) for seed in seeds for record in chosen]
        super().__init__(campaign, ledger, ended)

    def known(self) -> list[Record]:
        return self.ledger.repetitions

    def new(self) -> Record | None:
        for record, seed in self._pairs:
            run = f"{record.run}-seed{seed}"
            if self.ledger.get(run) is None:
                return Record(record.number, run, record.values, seed=seed, began=time.time())
        return None
