"""``jobs.retrain``: from data that may have changed to a champion that is measurably better, or the old one.

    lease ─► ingest ─► reason? ─► train ─► register ─► measure ─► decide ─► settle ─► report
                                 └──────────── every arrow is a line of the journal ────────┘

Whatever is interrupted is done again by the next run from the last line that was written; each part finds what it did
before (a run goes on from its checkpoint, a version is registered once, aliases move once).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

from ray.exceptions import RayError, RayTaskError

from pipeline import store, workflow
from pipeline.commands import part_of
from pipeline.config import Config, compose
from pipeline.data.dataset import read_manifest
from pipeline.data.ingest import ingest
from pipeline.data.manifest import MANIFEST_NAME, Manifest
from pipeline.errors import PipelineError, Stopped, Unavailable
from pipeline.registry.aliases import CHAMPION, Decision, alias_version, settle
from pipeline.registry.locks import Taken, locked
from pipeline.registry.promotion import KEPT, measure
from pipeline.registry.tracking import connect, reaching
from pipeline.registry.tracking_config import TRY_LATER, check_tracking
from pipeline.retraining.champion import champion_of, is_there, keep_classes, keep_weights, made_at, refuse_seen_classes
from pipeline.retraining.config import Settings, settings_of
from pipeline.retraining.journal import Entry, Journal, Outcome
from pipeline.retraining.report import same_command, say_end, say_nothing, try_again, write_report
from pipeline.retraining.trigger import find_work
from pipeline.training.cluster import start_ray
from pipeline.training.preemption import stopping_on_sigterm
from pipeline.training.runs import RUN_FILE

PROMOTED, UNCHANGED, BUSY = 0, 4, 5  # exit codes, beside KEPT
SAME = "the same command"
CODES = {"promoted": PROMOTED, "kept": KEPT, "unchanged": UNCHANGED, "busy": BUSY}


class Busy(PipelineError):
    """Another retraining of the model is under way."""


@contextmanager
def lease(tracking: Mapping[str, Any], name: str, seconds: float) -> Iterator[Callable[[], None]]:
    """Hold the model's lease, or raise Busy. What is yielded checks that it is still held.

    A holder on this machine whose process ended, and one elsewhere that was silent for ``seconds``, are dead.
    """
    try:
        with ExitStack() as stack:
            with reaching(tracking, "nothing was done; run again"):
                client = connect(tracking).client
                is_held = stack.enter_context(locked(client, f"{name}.retraining-lock", seconds))

            def still_held() -> None:
                with reaching(tracking, "run again"):
                    if not is_held():
                        raise Busy(f"another retraining of {name!r} took over from this one")

            yield still_held
    except Taken as taken:
        raise Busy(
            f"another retraining of {name!r} is under way, {taken}; wait for it, or, if it died, for {seconds:g} s"
        ) from taken


def retrain(raw: Config) -> dict[str, Any]:
    """Do what is due, or finish what was interrupted; what became of it."""
    settings = settings_of(raw)
    tracking = settings.train.tracking
    check_tracking(tracking, settings.name)
    again = same_command()
    try:
        with (
            part_of(again),
            stopping_on_sigterm(f"retraining of {settings.name}: stopped as asked; go on with it: {again or SAME}"),
            lease(tracking, settings.name, settings.retrain.lease) as still_held,
        ):
            summary = _retrain(settings, still_held)
    except Busy as busy:
        print(str(busy), flush=True)
        summary = {"outcome": "busy", "name": settings.name, "reason": str(busy)}
    code = CODES[summary["outcome"]]
    return {**summary, "exit_code": 0 if settings.retrain.exit_zero and code != BUSY else code}


def _retrain(settings: Settings, still_held: Callable[[], None]) -> dict[str, Any]:
    journal = Journal(settings.uri)
    entry = journal.open
    if entry is not None and entry.stage in ("trained", "decided") and not _is_registered(settings, entry):
        print(f"{entry.run} was interrupted, and its version was deleted since: it is registered again", flush=True)
        entry = journal.put(replace(entry, stage="begun", version=None, decision={}, outcome="", reason=""))
    if entry is not None and entry.stage in ("decided", "settled"):
        print(f"{entry.run} was interrupted after its decision: going on with it", flush=True)
        return _finish(settings, journal, entry, still_held)
    manifest = _bring_up_to_date(settings)
    if entry is not None and (entry.fingerprint, entry.recipe) != (manifest.fingerprint, settings.recipe):
        why = "data" if entry.fingerprint != manifest.fingerprint else "recipe"
        print(f"{entry.run} was interrupted, and its {why} changed since: given up", flush=True)
        reason = f"interrupted, and its {why} changed"
        journal.put(replace(entry, stage="done", outcome="superseded", reason=reason, ended=time.time()))
        entry = None
    if entry is not None:
        print(f"{entry.run} was interrupted: going on with it", flush=True)
        return _finish(settings, journal, entry, still_held)
    champion = champion_of(settings.train.tracking, settings.name)
    journal.since = made_at(settings.train.tracking, settings.name)
    entry = find_work(settings, journal, champion, manifest.fingerprint, time.time())
    if entry is None:
        return say_nothing(settings, journal, champion, manifest.fingerprint)
    settings.check_promotion(manifest, read_manifest(settings.train.dataset_uri))
    if champion is not None:
        how = settings.retrain.promotion
        refuse_seen_classes(settings.uri, champion, manifest, settings.train.train.split, how.split)
        if settings.retrain.start == "warm":
            entry = replace(entry, initial=keep_weights(settings.uri, champion, settings.train.tracking))
    print(f"retraining {settings.name}: {'; '.join(entry.reasons)}", flush=True)
    return _finish(settings, journal, journal.put(entry), still_held)


def _bring_up_to_date(settings: Settings) -> Manifest:
    """The dataset with what is new in its source; the classes of the old one are noted first."""
    uri = settings.train.dataset_uri
    if store.exists(store.join(uri, MANIFEST_NAME)):
        keep_classes(settings.uri, images_of(uri)[1])
    if settings.retrain.ingest:
        start_ray(settings.train.cluster)
        ingest(settings.ingest(), progress=False)
    manifest = images_of(uri)[1]
    keep_classes(settings.uri, manifest)
    return manifest


def images_of(uri: str) -> tuple[str, Manifest]:
    """Place and manifest of the images that a champion answers for: of features, of those they were made of."""
    manifest = read_manifest(uri)
    if manifest.network is None:
        return uri, manifest
    place = str(manifest.source.get("dataset"))
    images = read_manifest(place)
    if images.fingerprint != manifest.network["dataset"]["fingerprint"]:
        raise PipelineError(f"{uri} holds features of {place} as it was before: make those again, with jobs.embed")
    return place, images


def _finish(settings: Settings, journal: Journal, entry: Entry, still_held: Callable[[], None]) -> dict[str, Any]:
    """From where an entry is to its end."""
    if entry.stage == "begun":
        still_held()
        entry = _train(settings, journal, entry)
    if entry.stage == "decided":
        known = (entry.decision["champion"], entry.version if entry.decision["promoted"] else None)
        if _in_office(settings) not in known:  # the champion that the decision was about is no more
            entry = journal.put(replace(entry, stage="trained"))
    if entry.stage == "trained":
        still_held()
        entry = _decide(settings, journal, entry)
    if entry.stage == "decided":
        still_held()
        settle(settings.train.tracking, Decision(**entry.decision), again=True)
        entry = journal.put(replace(entry, stage="settled"))
    report = write_report(settings, entry)
    if entry.open:
        entry = journal.put(replace(entry, stage="done", ended=time.time()))
    return say_end(settings, entry, report)


def _train(settings: Settings, journal: Journal, entry: Entry) -> Entry:
    """Train and register the challenger, or go on with it; settled against it where it fails again and again.

    What is not the challenger's doing (a job that was asked to end, a store or a cluster that is away, a lost worker, a
    full disk) is no attempt: the next run goes on with it.
    """
    try:
        made = workflow.train(_training(settings, entry))
        if "version" not in made:
            kind = Unavailable if made["exit_code"] == TRY_LATER else PipelineError
            raise kind(f"{entry.run} is trained but not registered, run again: {made['undelivered']}")
    except Exception as error:
        if isinstance(error, Stopped | Unavailable | OSError | RayError) and not isinstance(error, RayTaskError):
            raise
        entry = journal.put(replace(entry, failures=entry.failures + 1))
        if entry.failures < settings.retrain.attempts:
            raise
        why = " ".join(str(error).split())[:500]
        reason = f"training failed {entry.failures} times and is given up, the last time with: {why}; {try_again()}"
        return journal.put(replace(entry, stage="settled", outcome="kept", reason=reason))
    return journal.put(replace(entry, stage="trained", version=int(made["version"])))


def _training(settings: Settings, entry: Entry) -> Config:
    """The configuration for ``jobs.train``: of a new run, or of one that goes on."""
    places = {key: settings.raw[key] for key in ("storage", "cluster", "tracking")}
    if store.exists(store.join(settings.train.storage, entry.run, RUN_FILE)):
        return {**compose("train"), **places, "resume": entry.run}
    raw = {**settings.raw, **places, "name": entry.run, "seed": entry.seed, "initial": entry.initial}
    if entry.initial is not None and raw["evaluation"] is not None:  # what it begins with is a champion, not untrained
        raw["evaluation"] = {**raw["evaluation"], "untrained": False}
    return raw


def _decide(settings: Settings, journal: Journal, entry: Entry) -> Entry:
    """Measure challenger and champion, and write the decision down before anything is moved."""
    assert entry.version is not None
    champion = _in_office(settings)
    if champion == entry.version:
        reason = "somebody promoted it meanwhile"
        return journal.put(replace(entry, stage="settled", outcome="promoted", reason=reason))
    images, _ = images_of(settings.train.dataset_uri)
    decision = measure(settings.promotion(entry.version, images), entry.version, champion)
    outcome: Outcome = "promoted" if decision.promoted else "kept"
    return journal.put(
        replace(entry, stage="decided", decision=asdict(decision), outcome=outcome, reason=decision.reason)
    )


def _is_registered(settings: Settings, entry: Entry) -> bool:
    assert entry.version is not None
    return is_there(settings.train.tracking, settings.name, entry.version, entry.run)


def _in_office(settings: Settings) -> int | None:
    """The champion of now."""
    with reaching(settings.train.tracking, "run again"):
        return alias_version(connect(settings.train.tracking).client, settings.name, CHAMPION)
