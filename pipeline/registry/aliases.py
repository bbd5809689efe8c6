"""Who is champion: aliases that move by a recorded decision, one at a time, and back again."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from mlflow import MlflowClient

from pipeline.errors import PipelineError
from pipeline.registry.locks import Taken, locked
from pipeline.registry.record import conclude
from pipeline.registry.tracking import Store, connect, reaching, registered_model, unknown_model

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
DECISION_TAG = "pipeline.promotion"
LOCK_WAIT, LOCK_STALE = 30.0, 300.0  # seconds: aliases move in milliseconds


@dataclass(frozen=True)
class Decision:
    """A challenger against the champion, and what came of it."""

    name: str  # of the registered model
    challenger: int  # version
    champion: int | None  # version that it was measured against
    promoted: bool
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)  # accuracies, paired difference, episodes, margin


def alias_version(client: MlflowClient, name: str, alias: str) -> int | None:
    """The version that an alias names, or None.

    Raises:
        PipelineError: there is no such registered model.
    """
    model = registered_model(client, name)
    if model is None:
        raise PipelineError(unknown_model(client, name))
    return int(model.aliases[alias]) if alias in model.aliases else None


def settle(
    tracking: Mapping[str, Any], decision: Decision, lock_wait: float = LOCK_WAIT, again: bool = False
) -> Decision:
    """Record a decision and, where it promotes, move ``@champion`` and ``@previous``.

    Of two promotions at once one waits, finds that the champion is no longer the one it was measured against, and is
    refused. Interrupted between two aliases it leaves the old champion in office, and can be done again.

    Args:
        again: an earlier call with this decision may have been interrupted: what it did stands and is completed.

    Raises:
        PipelineError: another version became champion meanwhile, or the store is away.
    """
    with reaching(tracking, "nothing was decided; try again"):
        store = connect(tracking, make=False)
        with promotion_lock(store.client, decision.name, lock_wait) as still_held:
            now = alias_version(store.client, decision.name, CHAMPION)
            moved = again and decision.promoted and now == decision.challenger
            if now != decision.champion and not moved:
                raise PipelineError(
                    f"version {now} of {decision.name!r} became champion meanwhile: version {decision.challenger} was "
                    f"measured against {decision.champion or 'none'}; measure again"
                )
            if decision.promoted and not moved:
                still_held()
                _move(store.client, decision.name, now, decision.challenger)
            _record(store, decision, again)
    return decision


def roll_back(tracking: Mapping[str, Any], name: str) -> Decision:
    """Let the previous champion be champion again; the one it replaces becomes the previous."""
    with reaching(tracking, f"look which version of {name!r} is @{CHAMPION}, and try again if it is the one that was"):
        store = connect(tracking, make=False)
        with promotion_lock(store.client, name) as still_held:
            now = alias_version(store.client, name, CHAMPION)
            before = alias_version(store.client, name, PREVIOUS)
            if before is None or before == now:
                raise PipelineError(f"registered model {name!r} has no previous champion to go back to")
            decision = Decision(name, before, now, True, "rolled back")
            still_held()
            store.client.set_registered_model_alias(name, CHAMPION, str(before))  # first: that is what was asked for
            if now is not None:
                store.client.set_registered_model_alias(name, PREVIOUS, str(now))
            _record(store, decision)
    return decision


@contextmanager
def promotion_lock(client: MlflowClient, name: str, wait: float = LOCK_WAIT) -> Iterator[Callable[[], None]]:
    """One promotion of a model at a time, on any machine.

    What is yielded checks that the lock is still held.
    """
    try:
        with locked(client, f"{name}.promotion-lock", LOCK_STALE, wait) as is_held:

            def still_held() -> None:
                if not is_held():
                    raise PipelineError(f"the promotion of {name!r} took so long that another one went on; try again")

            yield still_held
    except Taken as taken:
        raise PipelineError(f"another promotion of {name!r} is under way, {taken}; try again") from taken


def _move(client: MlflowClient, name: str, champion: int | None, challenger: int) -> None:
    if champion is not None and champion != challenger:
        client.set_registered_model_alias(name, PREVIOUS, str(champion))
    client.set_registered_model_alias(name, CHAMPION, str(challenger))


def _record(store: Store, decision: Decision, again: bool = False) -> None:
    """As an MLflow run with the figures, and on the challenger's version, which shows that all is recorded; ``again``:
    that may have been done, and is not done twice."""
    version = (decision.name, str(decision.challenger))
    text = json.dumps(asdict(decision), sort_keys=True)[:5000]
    if again and store.client.get_model_version(*version).tags.get(DECISION_TAG) == text:
        return
    told = {"reason": decision.reason, "challenger": str(decision.challenger), "champion": str(decision.champion)}
    run = store.client.create_run(
        store.experiment_id,
        run_name=f"promotion {decision.name} v{decision.challenger}",
        tags={DECISION_TAG: decision.name, "promoted": str(decision.promoted).lower(), **told},
    )
    texts = {"decision.json": json.dumps(asdict(decision), indent=1)}
    conclude(store, run.info.run_id, decision.figures, texts)
    store.client.set_model_version_tag(*version, DECISION_TAG, text)
