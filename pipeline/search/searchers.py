"""Which trial comes next: what Ray Tune asks, and tells of the trials, goes through the ledger."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from pipeline import store
from pipeline.errors import PipelineError
from pipeline.search.asha import ASHA
from pipeline.search.campaign import Campaign
from pipeline.search.ledger import Ledger, Record
from pipeline.search.propose import propose
from pipeline.search.trial import ACCURACY, FAILED, FINISHED, STEP
from pipeline.training.checkpoint import STATE
from pipeline.training.runs import Run, checkpoints
from pipeline.weights import own_sources

CRASHED = "its process died more often than it may (Ray's logs of this time tell more)"


class CampaignSearcher(Searcher):
    """Trials in their order: first those that were interrupted, then new ones. The ledger is its state.

    Args:
        ended: told of every trial that came to its end.
    """

    def __init__(
        self, campaign: Campaign, ledger: Ledger, ended: Callable[[Record], None] = lambda record: None
    ) -> None:
        super().__init__(metric=ACCURACY, mode="max")
        self.campaign, self.ledger, self.ended = campaign, ledger, ended
        self._interrupted = self.running()
        self._out: set[str] = set()  # runs that were handed out and are not back
        self._records: dict[str, Record] = {}  # by Tune's name of the trial

    def known(self) -> list[Record]:
        """The trials that there have been, of those that this searcher suggests."""
        raise NotImplementedError

    def new(self) -> Record | None:
        """A trial that there has not been."""
        raise NotImplementedError

    def running(self) -> list[Record]:
        return [record for record in self.known() if record.status == "running"]

    def replay(self, scheduler: ASHA) -> None:
        """Bring the scheduler to where it was; interrupted trials tell what they did unseen, and may end by it."""
        for record in self.known():
            running = record.status == "running"
            if running:
                record = self.refreshed(record)
                self.ledger.put(record)
            if scheduler.replay([record]) and running:
                self.stopped(record, record.step)
        self._interrupted = self.running()

    def open(self) -> bool:
        """Whether there is a trial left."""
        return bool(self._interrupted) or self.new() is not None

    def following(self) -> Record | None:
        return self._interrupted.pop(0) if self._interrupted else self.new()

    def next(self) -> tuple[Record, Run] | None:
        """The next trial that can be; one that asks for the impossible has failed before it began."""
        while (record := self.following()) is not None:
            try:
                run = self.campaign.prepare(record.values, record.run, record.seed)
            except PipelineError as error:
                self.end(replace(record, status="failed", reason=str(error)))
                continue
            self.ledger.put(record)
            self._out.add(record.run)
            return record, run
        return None

    def waits(self) -> bool:
        """Whether there may be more once those that run are back."""
        return False

    def until(self) -> int:
        """The step at which a trial pauses, to be gone on with later; 0: none."""
        return 0

    def stopped(self, record: Record, step: int) -> None:
        """It was stopped at this validation."""
        self.end(replace(record, status="stopped", reason=f"not among the best at step {step:,}"))

    def end(self, record: Record) -> None:
        self._out.discard(record.run)
        record = replace(record, ended=time.time())
        self.ledger.put(record)
        self.ended(record)

    # What Ray Tune calls:

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        found = self.next()
        if found is None:
            return None if self.waits() else Searcher.FINISHED
        record, run = found
        self._records[trial_id] = record
        return {
            "number": record.number,
            "name": record.run,
            "run": json.dumps(asdict(run)),
            "until": self.until(),
            "code": own_sources(run.spec),
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if ACCURACY in result:
            record = self._records[trial_id].with_point(int(result[STEP]), float(result[ACCURACY]))
            self._records[trial_id] = record
            self.ledger.put(record)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        record, said = self._records.pop(trial_id), result or {}
        if FAILED in said:
            self.end(replace(record, status="failed", reason=str(said[FAILED])))
        elif FINISHED in said:
            self.end(replace(self.refreshed(record), status="finished"))
        elif error or ACCURACY not in said:
            self.end(replace(record, status="failed", reason=CRASHED))
        else:  # what it computed after this validation does not count
            step = int(said[STEP])
            record = self.refreshed(record).with_point(step, float(said[ACCURACY]))
            self.stopped(replace(record, curve=tuple(point for point in record.curve if point[0] <= step)), step)

    def refreshed(self, record: Record) -> Record:
        """With the validations that its latest checkpoint knows of, told or not."""
        for uri in checkpoints(store.join(self.campaign.uri, record.run))[-1:]:
            for entry in json.loads(store.read_bytes(store.join(uri, STATE)))["history"]:
                if ACCURACY in entry:
                    record = record.with_point(int(entry["step"]), float(entry[ACCURACY]))
        return record

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for Tune's snapshots, which nothing is restored from

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        pass


class SearchTrials(CampaignSearcher):
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


class FinalistTrials(CampaignSearcher):
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
