"""The pages of ``docs/results`` and the README's table: what stands between their markers is made from measured files.

A file holds one run with its evaluation, a comparison of several runs, a campaign or a benchmark.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from docs.studies import campaigns, reproduction, variants
from docs.studies.benchmark.table import markdown as benchmark_table
from docs.studies.reproduction import published
from pipeline import store
from pipeline.errors import PipelineError
from pipeline.pages.comparison_tables import COMPARISONS
from pipeline.pages.published import by_setting, matching, setting
from pipeline.tables import markdown_table, percent

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "results"
_BLOCK = re.compile(r"(<!-- measured: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
COMPARED = "compared_"  # and the beginning of a dataset's name: its published and measured figures
VARIANTS = "variants_"  # the beginning of the name of a folder of runs over several seeds


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(FOLDER.glob("*.md"))]


def write_pages() -> list[Path]:
    """Make every block anew; the pages that changed."""
    changed = []
    for path in pages():
        before = path.read_text()
        after = page_text(before)
        if after != before:
            store.write_bytes(str(path), after.encode())
            changed.append(path)
    return changed


def page_text(text: str) -> str:
    """A page with the tables between its markers made anew from the measured files."""

    def table(match: re.Match[str]) -> str:
        return match[1] + render(match[2]) + "\n" + match[4]

    return _BLOCK.sub(table, text)


def render(name: str) -> str:
    """The Markdown of ``docs/results/NAME.json``; of all files together, for "finished" and "compared_DATASET"."""
    if name == "finished":
        return reproduction.finished(reproduction.entries(FOLDER))
    if name.startswith(COMPARED):
        found = reproduction.entries(FOLDER)
        return reproduction.markdown([e for e in found if e.dataset.startswith(name.removeprefix(COMPARED))])
    if name.startswith(VARIANTS):
        return variants.markdown(sorted((FOLDER / name).glob("*.json")))
    path = FOLDER / f"{name}.json"
    if not path.exists():
        kind = next((kind for kind in (*COMPARISONS, "campaign") if name.startswith(kind)), None)
        job = "jobs.evaluate run=..." if kind is None else f"jobs.report {kind} runs=[...]"
        raise PipelineError(f"no measurement {path}: make it with {job} record={path.name}")
    measured = json.loads(path.read_text())
    if measured["protocol"] == "benchmark":
        return benchmark_table(measured)
    if measured["protocol"] == "campaign":
        return campaigns.markdown(measured)
    if measured["protocol"] in COMPARISONS:
        return _comparison(measured)
    table = _joint(measured) if measured["protocol"] == "generalized" else _episodic(measured)
    minutes = measured["train_seconds"] / 60
    weights = measured.get("weights")
    return (
        f"{table}\n\n{_curve(measured)}{_paired(measured)}"
        f"`{measured['command']}`, {measured['steps']:,} steps, {minutes:.0f} minutes "
        f"on {measured['machine']['cores']} cores, seed {measured['seed']}; then `{measured['evaluation']}`"
        + (f"; {weights}" if weights else "")
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
