"""Measured tables: a small JSON file a measurement, from which the tables of the README are made.

A file holds one run with its evaluation, or a comparison of several runs; the block "reproduction" is made of all.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.benchmark.table import markdown as benchmark_table
from pipeline.errors import PipelineError
from pipeline.inference.files import write_atomic
from pipeline.report import findings, reproduction
from pipeline.report.published import by_setting, matching, published, setting
from pipeline.tables import markdown_table, percent
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.runs import Run

FOLDER = Path(__file__).parent / "measured"
README = Path(__file__).resolve().parents[2] / "README.md"
_BLOCK = re.compile(r"(<!-- measured: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
COMPARISONS = {"cross_table": findings.cross_table, "clustering": findings.clustering}  # protocols of several runs
_HERE = ("storage", "data", "name", "tracking", "resume", "register_as")  # of the machine, not of the measurement


def record(
    path: str,
    run: Run,
    checkpoint: Checkpoint,
    results: list[dict[str, Any]],
    protocol: str,
    comparison: list[dict[str, Any]] | None = None,
) -> None:
    """Write what was measured, and all it takes to measure it again; ``comparison`` with another run, in pairs."""
    history = checkpoint.history
    content = {
        "command": _trained_by(run),
        "evaluation": shlex.join(["python", "-m", "jobs.evaluate", "run=RUN", *_portable(sys.argv[1:])]),
        "protocol": protocol,
        **_about(checkpoint),
        "curve": [[e["step"], e["val/accuracy"], e["val/interval"]] for e in history if "val/accuracy" in e],
        "results": results,
        **({"comparison": comparison} if comparison else {}),
    }
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def record_comparison(path: str, runs: list[tuple[Run, Checkpoint, str]], found: dict[str, Any], protocol: str) -> None:
    """Write a comparison of (run, checkpoint, "meta" or "classical"), and all it takes to make it again.

    ``found`` has the "results" and "comparisons" that :mod:`pipeline.report.findings` makes tables of.
    """
    content = {
        "command": shlex.join(["python", "-m", "jobs.report", *_portable(sys.argv[1:])]),
        "protocol": protocol,
        "runs": [
            {"name": run.name, "kind": kind, "command": _trained_by(run), **_about(checkpoint)}
            for run, checkpoint, kind in runs
        ],
        "machine": machine(),
        **found,
    }
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def _trained_by(run: Run) -> str:
    return shlex.join(["python", "-m", "jobs.train", *_portable(list(run.arguments))])


def _about(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "method": checkpoint.spec["method"]["name"],
        "dataset": {key: checkpoint.dataset[key] for key in ("name", "fingerprint")},
        "steps": checkpoint.step,
        "seed": checkpoint.config["seed"],
        "train_seconds": round(_seconds(checkpoint.history, checkpoint.config["log_every"])),
        "machine": machine(),
        "config": {key: value for key, value in checkpoint.config.items() if key not in _HERE},
    }


def machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "python": platform.python_version(), "torch": str(torch.__version__)}


def readme_text(text: str) -> str:
    """The README with the tables between its markers made anew from the measured files."""

    def table(match: re.Match[str]) -> str:
        return match[1] + render(match[2]) + "\n" + match[4]

    return _BLOCK.sub(table, text)


def render(name: str) -> str:
    """The Markdown of ``measured/NAME.json``; of all files, for "reproduction"."""
    if name == "reproduction":
        return f"{reproduction.markdown(reproduction.entries(FOLDER))}\n\n`python -m jobs.report reproduction`"
    path = FOLDER / f"{name}.json"
    if not path.exists():
        kind = next((kind for kind in (*COMPARISONS, "campaign") if name.startswith(kind)), None)
        job = "jobs.evaluate run=..." if kind is None else f"jobs.report {kind} runs=[...]"
        raise PipelineError(f"no measurement {path}: make it with {job} record={path.name}")
    measured = json.loads(path.read_text())
    if measured["protocol"] == "benchmark":
        return benchmark_table(measured)
    if measured["protocol"] == "campaign":
        from pipeline.report import campaigns  # and with it the search, which no training waits for

        return campaigns.markdown(measured)
    if measured["protocol"] in COMPARISONS:
        return _comparison(measured)
    table = _joint(measured) if measured["protocol"] == "generalized" else _episodic(measured)
    minutes = measured["train_seconds"] / 60
    return (
        f"{table}\n\n{_curve(measured)}{_paired(measured)}"
        f"`{measured['command']}`, {measured['steps']:,} steps, {minutes:.0f} minutes "
        f"on {measured['machine']['cores']} cores, seed {measured['seed']}; then `{measured['evaluation']}`"
    )


def _curve(measured: dict[str, Any]) -> str:
    """Validation accuracy at about eight steps, doubling, of a run that was stopped before its recipe's end."""
    curve = measured["curve"]
    if measured["steps"] >= measured["config"]["steps"] or not curve:
        return ""
    chosen = [next(point for point in curve if point[0] >= curve[-1][0] / 2**k) for k in range(7, -1, -1)]
    points = dict((step, accuracy) for step, accuracy, _ in chosen)
    listed = ", ".join(f"{100 * accuracy:.1f} ({step:,})" for step, accuracy in points.items())
    return f"Validation accuracy in percent (after so many steps): {listed}.\n\n"


def _paired(measured: dict[str, Any]) -> str:
    """The difference to another run on the same episodes, and what its interval says."""
    lines = []
    for found in measured.get("comparison", []):
        low, high = 100 * found["low"], 100 * found["high"]
        says = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
        lines.append(f"{found['question']} {100 * found['difference']:+.2f} ({low:+.2f} … {high:+.2f}: {says})")
    other = next((r["model"] for r in measured["results"] if r["model"] not in ("trained", "untrained")), "")
    return f"Points of accuracy more than {other}, on the same episodes: {'; '.join(lines)}.\n\n" if lines else ""


def _comparison(measured: dict[str, Any]) -> str:
    table = COMPARISONS[measured["protocol"]](measured, markdown_table)
    runs = [
        f"- {run['name']}: `{run['command']}`, {run['steps']:,} steps, {run['train_seconds'] / 60:.0f} minutes"
        for run in measured["runs"]
    ]
    return f"{table}\n\n" + "\n".join(runs) + f"\n\n`{measured['command']}`"


def _episodic(measured: dict[str, Any]) -> str:
    mine = matching(published(), measured["method"], measured["config"])
    of_paper = by_setting(mine, measured["dataset"]["name"])
    rows = []
    for result in measured["results"]:
        paper = of_paper.get(setting(result), {})
        rows.append(
            [
                result["model"],
                setting(result),
                percent(result["accuracy"], result["interval"]),
                f"{100 * paper['accuracy']:.1f}" if paper else "",
                f"{100 * paper['reruns']:.1f}" if "reruns" in paper else "",
                f"{result['episodes']:,}",
            ]
        )
    return markdown_table(["model", "episodes of", "measured, %", "published", "re-runs of others", "episodes"], rows)


def _joint(measured: dict[str, Any]) -> str:
    rows = []
    for result in measured["results"]:
        figures = [
            percent(result[k]["accuracy"], result[k]["interval"]) for k in ("novel", "base", "all", "novel_only")
        ]
        tuned = result["fine_tuning"]
        kind = f"fine-tuned, {tuned['steps']} steps" if tuned else "imprinted"
        rows.append([result["shot"], kind, *figures, result["draws"]])
    header = ["n", "classifier", "novel among all, %", "base among all, %", "all, %", "novel among novel, %", "draws"]
    return markdown_table(header, rows)


def _seconds(history: list[dict[str, float]], log_every: int) -> float:
    logged = [entry for entry in history if "train/steps_per_s" in entry]
    steps = [entry["step"] for entry in logged]
    windows = [b - a for a, b in zip([0, *steps], steps, strict=False)]
    return sum(min(w, log_every) / e["train/steps_per_s"] for w, e in zip(windows, logged, strict=True))


def _portable(overrides: list[str]) -> list[str]:
    machine = (
        "storage=",
        "data.root=",
        "name=",
        "tracking",
        "register_as=",
        "cluster.object_store_mb=",
        "record=",
        "output=",
    )
    kept = [override for override in overrides if not override.startswith((*machine, "--", "run="))]
    return [re.sub(r"^runs=/.*/", "runs=", override) for override in kept]  # an archive's place
