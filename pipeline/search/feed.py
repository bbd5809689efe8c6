"""Between Ray Tune and a plan: hands out trials, and writes what Tune tells of them into the ledger."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from pipeline import store
from pipeline.search.ledger import Record
from pipeline.search.plans import Plan
from pipeline.search.release import HELD, release
from pipeline.search.trial import ACCURACY, FAILED, FINISHED, STEP
from pipeline.training.runs import checkpoints

CRASHED = "its process died more often than it may (Ray's logs of this time tell more)"


class Feed(Searcher):
    """A search algorithm of Ray Tune; its state is the ledger."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(metric=ACCURACY, mode="max")
        self._plan = plan
        self._records: dict[str, Record] = {}
        self._said: dict[str, dict[str, Any]] = {}  # of trials, what they said at their end
        self._held: dict[str, str] = {}  # of trials, what they hold on the cluster

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its parts down, for a restoration that the ledger makes needless

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        found = self._plan.next()
        if found is None:
            return None if self._plan.waits() else Searcher.FINISHED
        record, run = found
        self._records[trial_id] = record
        until = self._plan.until()
        return {"number": record.number, "name": record.run, "run": json.dumps(asdict(run)), "until": until}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        record = self._records[trial_id]
        if HELD in result:
            self._held[trial_id] = result[HELD]
        elif ACCURACY in result:
            record = record.with_point(int(result[STEP]), float(result[ACCURACY]))
            self._records[trial_id] = record
            self._plan.ledger.put(record)
        elif FAILED in result or FINISHED in result:
            self._said[trial_id] = result

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        record = self._records.pop(trial_id)
        said = {**(result or {}), **self._said.pop(trial_id, {})}
        held = self._held.pop(trial_id, None)
        if held and not (FAILED in said or FINISHED in said):
            release(held)
        uri = store.join(self._plan.campaign.uri, record.run)
        if FAILED in said:
            self._plan.end(replace(record, status="failed", reason=str(said[FAILED])))
        elif FINISHED in said:
            self._plan.end(replace(refreshed(record, uri), status="finished"))
        elif error or ACCURACY not in said:
            self._plan.end(replace(record, status="failed", reason=CRASHED))
        else:  # Tune stopped it at this validation; what it computed in the meantime does not count
            record = refreshed(record, uri).with_point(int(said[STEP]), float(said[ACCURACY]))
            points = tuple(point for point in record.curve if point[0] <= int(said[STEP]))
            self._plan.stopped(replace(record, curve=points), int(said[STEP]))

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        pass


def refreshed(record: Record, run_uri: str) -> Record:
    """With the validations that its latest checkpoint knows of, told or not."""
    found = checkpoints(run_uri)
    if not found:
        return record
    state = json.loads(store.read_bytes(store.join(found[-1], "state.json")))
    for entry in state["history"]:
        if ACCURACY in entry:
            record = record.with_point(int(entry["step"]), float(entry[ACCURACY]))
    return record
