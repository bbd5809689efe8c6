"""What became of every trial: one file, a line a trial, replaced whole at every change, from which all is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pipeline import store
from pipeline.charts.campaign import Trial
from pipeline.errors import PipelineError
from pipeline.search.space import Known, Values

LEDGER_FILE = "ledger.jsonl"
Status = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Record(Trial):
    """A trial.

    ``status``: running (or interrupted: it goes on when the campaign is resumed), finished, stopped (by the scheduler)
    or failed, with its ``reason``. ``curve``: (step, validation accuracy) of every validation.
    """

    number: int  # of the configuration
    run: str  # its run, and folder
    values: Values
    status: Status = "running"
    reason: str = ""
    curve: tuple[tuple[int, float], ...] = ()
    seed: int | None = None  # of a finalist's repetition; None: a trial of the search
    parent: str = ""  # run that it is a copy of, with perturbed values (population-based training)
    began_at: int = 0  # step at which it was copied
    began: float = 0.0  # seconds since 1970
    ended: float | None = None

    def known(self, select: str) -> Known:
        """As the search sees it."""
        if self.status == "running":
            return Known(self.values, None)
        if self.status == "failed":
            return Known(self.values, 0.0)
        score = self.score(select)
        return Known(self.values, 0.0 if score is None else score, self.curve, self.status == "stopped")

    def with_point(self, step: int, accuracy: float) -> Record:
        """With one more validation; one that is known already (a worker died, a driver died) is not counted twice."""
        points = {**dict(self.curve), step: accuracy}
        return replace(self, curve=tuple(sorted(points.items())))


class Ledger:
    """Records by run, in the order in which they began; the driver alone writes."""

    def __init__(self, campaign_uri: str) -> None:
        self.uri = store.join(campaign_uri, LEDGER_FILE)
        self._records: dict[str, Record] = {}
        if store.exists(self.uri):
            for line in store.read_bytes(self.uri).decode().splitlines():
                record = _record(line, self.uri)
                self._records[record.run] = record

    def put(self, *records: Record) -> None:
        """Note what became of trials, all in one write."""
        self._records |= {record.run: record for record in records}
        lines = [json.dumps(asdict(entry)) for entry in self._records.values()]
        store.write_bytes(self.uri, ("\n".join(lines) + "\n").encode())

    def get(self, run: str) -> Record | None:
        return self._records.get(run)

    @property
    def search(self) -> list[Record]:
        """Trials of the search."""
        return [record for record in self._records.values() if record.seed is None]

    @property
    def repetitions(self) -> list[Record]:
        """Trials of the finalists."""
        return [record for record in self._records.values() if record.seed is not None]


def ranked(records: Sequence[Record], select: str) -> list[Record]:
    """Finished trials, best first, the earlier of equals first."""
    scored = [(record, record.score(select)) for record in records if record.status == "finished"]
    return [r for r, s in sorted(((r, s) for r, s in scored if s is not None), key=lambda rs: (-rs[1], rs[0].number))]


def _record(line: str, uri: str) -> Record:
    try:
        entry: Mapping[str, Any] = json.loads(line)
        curve = tuple((int(step), float(accuracy)) for step, accuracy in entry["curve"])
        return Record(**{**entry, "curve": curve})
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{uri} is damaged ({error}); restore it, or begin a new campaign") from error
