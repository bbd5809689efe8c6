"""What a campaign found, for a page: the best against the default, and accuracy over what was searched."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from pipeline import store
from pipeline.config import Config, compose, flat
from pipeline.environment import code_version, machine
from pipeline.errors import PipelineError
from pipeline.search.campaign import CAMPAIGN_FILE
from pipeline.search.ledger import LEDGER_FILE
from pipeline.search.results import value_text
from pipeline.search.run import PLOTS, SUMMARY
from pipeline.tables import markdown_table, percent

_HERE = ("campaign", "name", "storage", "tracking", "resume", "register_as", "concurrent")  # not of the measurement
OVER = "accuracy_over_"
FEW = 3  # different values of a number, up to which there is no curve to show


def record_campaign(target: str | Path, name: str, storage: str) -> dict[str, Any]:
    """Write what a finished campaign found, and its plots of accuracy beside, as ``NAME_KEY.png``."""
    target = str(target)  # no Path, which would make s3:/ of s3://
    uri = store.join(storage, name)
    if not store.exists(store.join(uri, SUMMARY)):
        raise PipelineError(f"{uri} is not a campaign that has ended; go on with it: python -m jobs.tune resume={name}")
    try:
        described = json.loads(store.read_bytes(store.join(uri, CAMPAIGN_FILE)))
        found = json.loads(store.read_bytes(store.join(uri, SUMMARY)))
        lines = store.read_bytes(store.join(uri, LEDGER_FILE)).decode().splitlines()
    except ValueError as error:
        raise PipelineError(f"{uri}: a file of this campaign is not JSON ({error})") from error
    if "finalists" not in found:
        raise PipelineError(f"{uri}: not one trial of this campaign finished")
    raw = described["config"]
    trials = [trial for trial in found["trials"] if trial["seed"] is None]
    began = [record["began"] for record in map(json.loads, lines)]
    ended = [record["ended"] or record["began"] for record in map(json.loads, lines)]
    content = {
        "command": command(raw),
        "protocol": "campaign",
        "dataset": {key: described["dataset"][key] for key in ("name", "fingerprint")},
        "seconds": round(max(ended) - min(began)),
        "code": code_version(),
        "machine": machine(),
        "config": {key: value for key, value in raw.items() if key not in _HERE},
        "results": [{k: v for k, v in trial.items() if k not in ("run", "seed")} for trial in trials],
        "finalists": found["finalists"],
        "comparison": found["comparison"],
        "statement": found["statement"],
    }
    content["plots"] = {}
    for plot in store.list_names(store.join(uri, PLOTS)):
        key = plot.removeprefix(OVER).removesuffix(".png")
        if plot == f"{OVER}{key}.png" and len({str(trial["values"].get(key)) for trial in trials}) > FEW:
            content["plots"][key] = f"{Path(target).stem}_{key.rpartition('.')[2]}.png"
            image = store.read_bytes(store.join(uri, PLOTS, plot))
            store.write_bytes(target[: target.rfind("/") + 1] + content["plots"][key], image)
    store.write_bytes(target, (json.dumps(content, indent=1) + "\n").encode())
    return content


def command(raw: Config) -> str:
    """The command line that makes this campaign, without what is of the machine."""
    arguments = [f"campaign={raw['campaign']}"] if raw.get("campaign") else []
    ready = flat(compose("tune", arguments))
    for key, value in flat(raw).items():
        if key.split(".")[0] in _HERE or ready.get(key) == value:
            continue
        if key in ("overrides", "fix"):
            prefix = {"overrides": "base", "fix": "fix"}[key]
            arguments += [f"{prefix}.{argument}" for argument in value]
        else:
            arguments.append(f"{key}={'null' if value is None else value}")
    return shlex.join(["python", "-m", "jobs.tune", *arguments])


def markdown(content: dict[str, Any]) -> str:
    """The finalists, every trial's accuracy over each of the best one's numbers, the best of each of its choices, the
    sentence about it, the plots."""
    standing = content["finalists"]
    keys = dict.fromkeys(key for found in standing for key in found["values"])
    varied = [key for key in keys if len({str(t["values"].get(key)) for t in content["results"]}) > 1]
    rows = [
        [
            *(value_text(found["values"].get(key, "")) for key in varied),
            percent(found["accuracy"], found["interval"]),
            " ".join(percent(score) for score in found["by_seed"]),
            "default" if found["default"] else "",
        ]
        for found in standing
    ]
    parts = [markdown_table([*varied, "validation accuracy, %", "by seed", ""], rows)]
    for key in (key for key in varied if key in standing[0]["values"]):
        known = sorted(
            (float(t["values"][key]), t["accuracy"])
            for t in content["results"]
            if t["status"] == "finished" and isinstance(t["values"].get(key), (int, float))
        )
        if len({value for value, _ in known}) > FEW:
            listed = ", ".join(f"{value_text(value)}: {percent(accuracy)}" for value, accuracy in known)
            parts.append(f"Accuracy over {key}, one seed: {listed}.")
        named: dict[str, float] = {}
        for trial in content["results"]:
            if trial["status"] == "finished" and isinstance(choice := trial["values"].get(key), str):
                named[choice] = max(trial["accuracy"], named.get(choice, 0.0))
        if len(named) > FEW:
            best = sorted(named.items(), key=lambda item: -item[1])
            listed = ", ".join(f"{choice} {percent(accuracy)}" for choice, accuracy in best)
            parts.append(f"The best of each {key}, one seed: {listed}.")
    counts = {status: sum(t["status"] == status for t in content["results"]) for status in ("stopped", "failed")}
    also = "".join(f", {number} {status}" for status, number in counts.items() if number)
    sentence = content["statement"]
    parts.append(f"{sentence[0].upper()}{sentence[1:]}.")
    for key, plot in content["plots"].items():
        parts.append(f"![Validation accuracy over {key}]({plot})")
    parts.append(
        f"`{content['command']}`, {len(content['results'])} trials{also}, {content['seconds'] / 60:.0f} minutes on "
        f"{content['machine']['cores']} cores"
    )
    return "\n\n".join(parts)
