"""What a retraining did, for people and for machines: a page beside the journal, a run in MLflow, the last lines."""

import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any

from pipeline import store
from pipeline.commands import command
from pipeline.registry.masking import mask_argument
from pipeline.registry.record import conclude
from pipeline.registry.tracking import connect, reaching
from pipeline.retraining.champion import Champion
from pipeline.retraining.config import Settings
from pipeline.retraining.journal import Entry, Journal
from pipeline.retraining.trigger import key_of
from pipeline.tables import markdown_table, percent

RETRAINING_TAG = "pipeline.retraining"  # of the MLflow run: the name of the challenger's run
PAGE = "retraining.md"
FORCED = "retrain.force=true"


def write_report(settings: Settings, entry: Entry) -> str:
    """The page's place. In MLflow a retraining is one run, whoever comes to write it."""
    page = page_of(settings, entry)
    where = store.join(settings.uri, f"{entry.run}.md")
    store.write_bytes(where, page.encode())
    tracking = settings.train.tracking
    with reaching(tracking, "run again"):
        made = connect(tracking)
        wanted = f"tags.`{RETRAINING_TAG}` = '{entry.run}'"
        tags = {RETRAINING_TAG: entry.run, "model": settings.name, "outcome": entry.outcome, "reason": entry.reason}
        found = made.client.search_runs([made.experiment_id], wanted, max_results=1)
        name = f"retraining {entry.run}"
        run = found[0] if found else made.client.create_run(made.experiment_id, run_name=name, tags=tags)
        figures = {k: v for k, v in entry.decision.get("figures", {}).items() if k not in run.data.metrics}
        texts = {PAGE: page, "retraining.json": json.dumps(asdict(entry), indent=1)}
        conclude(made, run.info.run_id, figures, texts)
    return where


def page_of(settings: Settings, entry: Entry) -> str:
    """In Markdown."""
    lines = [
        f"# Retraining of {settings.name}: {'a new champion' if entry.outcome == 'promoted' else 'the champion stays'}",
        "",
        f"- why it was done: {'; '.join(entry.reasons)}",
        f"- what came of it: {entry.reason}",
        f"- data: {settings.train.dataset_uri}, fingerprint `{entry.fingerprint}`",
        f"- run: `{entry.run}`, seed {entry.seed}, first weights: {entry.initial or 'by seed'}",
        f"- begun: {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(entry.began))}",
    ]
    if entry.version is not None:
        lines.append(f"- challenger: version {entry.version}; champion before: {entry.decision.get('champion')}")
    if q := entry.decision.get("figures", {}):
        asked = f"{q['way']}-way {q['shot']}-shot, {q['episodes']:,} episodes of split {q['split']}"
        rows = [["challenger", percent(q["accuracy.challenger"])]]
        if "accuracy.champion" in q:
            advantage = f"{100 * q['difference']:+.2f} ({100 * q['low']:+.2f} … {100 * q['high']:+.2f})"
            rows.append(["champion", percent(q["accuracy.champion"])])
            rows.append([f"difference, {100 * q['confidence']:.0f} % interval", advantage])
        lines += ["", markdown_table([asked, "accuracy, %"], rows)]
    return "\n".join(lines) + "\n"


def say_end(settings: Settings, entry: Entry, page: str) -> dict[str, Any]:
    """The final lines, and the summary."""
    what = "new champion" if entry.outcome == "promoted" else "the champion stays"
    print(f"\noutcome    {what}: {entry.reason}")
    print(f"run        {store.join(settings.train.storage, entry.run)}")
    if entry.version is not None:
        print(f"challenger models:/{settings.name}/{entry.version}")
    print(f"report     {page}", flush=True)
    return {
        "outcome": entry.outcome,
        "name": settings.name,
        "reasons": list(entry.reasons),
        "reason": entry.reason,
        "run": entry.run,
        "version": entry.version,
        "champion": entry.version if entry.outcome == "promoted" else entry.decision.get("champion", entry.champion),
        "champion_before": entry.decision.get("champion", entry.champion),
        "fingerprint": entry.fingerprint,
        "report": page,
        **entry.decision.get("figures", {}),
    }


def say_nothing(settings: Settings, journal: Journal, champion: Champion | None, fingerprint: str) -> dict[str, Any]:
    """Nothing was due, and why."""
    version = None if champion is None else champion.version
    tried = [entry for entry in journal.entries if entry.fingerprint == fingerprint and entry.outcome == "kept"]
    same = journal.of(key_of(settings, version, fingerprint))
    if same and same[-1].outcome == "kept" and same[-1].version is None:  # its training failed, again and again
        failed = same[-1]
        reason = f"{failed.run} was given up: its training failed {failed.failures} times; {try_again()}"
    elif champion is not None and champion.fingerprint == fingerprint:
        reason = f"champion {version} was trained on these data"
    elif tried:
        reason = f"a challenger was trained on these data already ({tried[-1].run}), and the champion stayed"
    else:
        reason = "nothing asks for it"
    print(f"\noutcome    nothing to do: {reason}")
    print(f"data       {settings.train.dataset_uri}, fingerprint {fingerprint[:12]}", flush=True)
    return {
        "outcome": "unchanged", "name": settings.name, "reason": reason, "champion": version,
        "fingerprint": fingerprint,
    }  # fmt: skip


def same_command(*, forced: bool = False) -> str | None:
    """The command that was given, which finishes what it began; ``forced``: and trains where nothing asks for it. None
    where a program calls this."""
    if os.path.basename(sys.argv[0]) != "retrain.py":
        return None
    given = [mask_argument(argument) for argument in sys.argv[1:]]
    if forced:
        given = [*(argument for argument in given if not argument.startswith("retrain.force=")), FORCED]
    return command("retrain", *given)


def try_again() -> str:
    """What trains once more where nothing asks for it."""
    again = same_command(forced=True)
    return f"try again with the same arguments and {FORCED}" if again is None else f"try again with: {again}"
