"""Whether there is a reason to train a challenger, and a name for the work that makes the same reason the same work."""

import hashlib
import json
import re

from pipeline.retraining.champion import Champion
from pipeline.retraining.config import Settings
from pipeline.retraining.journal import Entry, Journal

DAY = 86400.0


def find_work(
    settings: Settings, journal: Journal, champion: Champion | None, fingerprint: str, now: float
) -> Entry | None:
    """The retraining that is due, or None.

    A challenger that lost to this champion on these data by this recipe is not trained again, until the champion and
    the last attempt are older than the limit, or somebody forces it; then it gets another seed.
    """
    version = None if champion is None else champion.version
    key = key_of(settings, version, fingerprint)
    before = journal.of(key)
    word = "" if isinstance(settings.retrain.force, bool) else settings.retrain.force
    reasons = []
    if not before and champion is None:
        reasons.append("there is no champion")
    elif not before and champion is not None and champion.fingerprint != fingerprint:
        known = "an unknown dataset" if champion.fingerprint is None else f"data {champion.fingerprint[:12]}"
        reasons.append(f"champion {version} was trained on {known}; now they are {fingerprint[:12]}")
    limit = settings.retrain.max_age_days
    if limit is not None and champion is not None:
        last = max([champion.made, *(entry.ended or entry.began for entry in before)])
        if now - last > limit * DAY:
            reasons.append(f"champion {version} and the last attempt are older than {limit:g} days")
    if word and all(entry.word != word for entry in journal.entries if entry.outcome != "superseded"):
        reasons.append(f"forced: {word}")
    elif settings.retrain.force is True:
        reasons.append("forced")
    if not reasons:
        return None
    number = len(journal.decided(key))
    name = re.sub(r"[^A-Za-z0-9._-]", "_", settings.name).lstrip("._-") or "model"  # as far as a run's may have it
    return Entry(
        key=key,
        number=number,
        run=f"{name}-{key}-{number}",
        reasons=tuple(reasons),
        fingerprint=fingerprint,
        recipe=settings.recipe,
        champion=version,
        seed=settings.train.seed + number,
        began=now,
        word=word,
    )


def key_of(settings: Settings, champion: int | None, fingerprint: str) -> str:
    """The name of the work: who is challenged, on which data, by which recipe."""
    work = [settings.name, champion, fingerprint, settings.recipe]
    return hashlib.sha256(json.dumps(work).encode()).hexdigest()[:12]
