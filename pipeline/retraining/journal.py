"""What became of every retraining of a model: one file, replaced whole at every change, from which all is resumed."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline import store
from pipeline.errors import PipelineError

JOURNAL = "journal.json"
SCHEMA_VERSION = 1
Stage = Literal["begun", "trained", "decided", "settled", "done"]
Outcome = Literal["", "promoted", "kept", "superseded"]


@dataclass(frozen=True)
class Entry:
    """A retraining, and how far it is.

    ``stage``: begun (its training may be under way), trained (its version is registered), decided (measured, the
    decision is written here), settled (the aliases are as decided), done (reported).
    """

    key: str  # of what it is about: champion, data and recipe
    number: int  # how many retrainings of this key came before
    run: str  # its run
    reasons: tuple[str, ...]
    fingerprint: str  # of the data
    recipe: str
    champion: int | None  # version in office when it began
    seed: int
    began: float  # seconds since 1970
    word: str = ""  # what it was forced with
    initial: str | None = None  # checkpoint whose weights it begins with
    stage: Stage = "begun"
    failures: int = 0
    version: int | None = None
    decision: dict[str, Any] = field(default_factory=dict)
    outcome: Outcome = ""
    reason: str = ""  # of the outcome
    ended: float | None = None

    @property
    def open(self) -> bool:
        return self.stage != "done"


class Journal:
    """Entries in the order in which they began. Whoever holds the model's lease writes."""

    def __init__(self, folder: str) -> None:
        self.uri = store.join(folder, JOURNAL)
        self.since = 0.0  # when the registered model was made: one of this name that was deleted had other versions
        self.entries: list[Entry] = []
        if store.exists(self.uri):
            self.entries = _read(store.read_bytes(self.uri), self.uri)

    def put(self, entry: Entry) -> Entry:
        """Write an entry in the place of its older self, or as the last one."""
        runs = [known.run for known in self.entries]
        if entry.run in runs:
            self.entries[runs.index(entry.run)] = entry
        else:
            self.entries.append(entry)
        content = {"schema": SCHEMA_VERSION, "entries": [asdict(known) for known in self.entries]}
        store.write_bytes(self.uri, (json.dumps(content, indent=1) + "\n").encode())
        return entry

    @property
    def open(self) -> Entry | None:
        """The one that was interrupted."""
        return next((entry for entry in reversed(self.entries) if entry.open), None)

    def of(self, key: str) -> Sequence[Entry]:
        """Those that came to a decision about the same."""
        return [entry for entry in self.decided(key) if self._counts(entry)]

    def decided(self, key: str) -> Sequence[Entry]:
        """Those of :meth:`of`, and those of deleted models of this name."""
        return [entry for entry in self.entries if entry.key == key and entry.outcome in ("promoted", "kept")]

    def _counts(self, entry: Entry) -> bool:
        made_no_model = entry.champion is None and entry.version is None
        return made_no_model or (entry.ended or entry.began) > self.since


def _read(content: bytes, uri: str) -> list[Entry]:
    try:
        found = json.loads(content)
        if found["schema"] != SCHEMA_VERSION:
            raise PipelineError(f"{uri} has schema {found['schema']}; this code reads {SCHEMA_VERSION}")
        return [Entry(**{**entry, "reasons": tuple(entry["reasons"])}) for entry in found["entries"]]
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{uri} is damaged ({error}); restore it, or move it away to begin anew") from error
