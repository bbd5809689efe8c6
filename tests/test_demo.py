"""The demonstration tells the truth about its answers, and goes the whole road."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import compose
from pipeline.data.dataset import Dataset
from pipeline.demo import DemoConfig, demo, export_examples, verdict
from pipeline.errors import PipelineError

CONFIG = DemoConfig(data={}, method="prototypical", recipe="demo", support=3, queries=2, classes=4)


def test_examples_are_disjoint_and_hold_a_stranger(glyphs: str, tmp_path: Path) -> None:
    export_examples(CONFIG, Dataset(glyphs), tmp_path)
    support = {file.relative_to(tmp_path / "support") for file in tmp_path.glob("support/*/*.png")}
    queries = {file.relative_to(tmp_path / "queries") for file in tmp_path.glob("queries/*/*.png")}
    assert len(support) == 4 * 3 and len(queries) == 5 * 2 and not support & queries
    assert len({q.parent for q in queries} - {s.parent for s in support}) == 1


def test_the_verdict_counts_names_and_strangers(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "support" / name).mkdir(parents=True)
    told = [("a", "a"), ("a", "b"), ("b", None), ("b", "b"), ("c", None), ("c", "a"), ("c", None)]
    answers = [{"file": f"queries/{truth}/0.png", "label": label} for truth, label in told]
    assert "2 of 4 images" in verdict(answers, tmp_path) and "2 of 3 of a class" in verdict(answers, tmp_path)


def test_another_name_is_of_the_chosen_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def run_job(*arguments: str) -> dict[str, str]:
        asked.append(arguments)
        return {"run": "r", "folder": "f"}

    monkeypatch.setattr("pipeline.demo.run_job", run_job)
    for file, given in (("glyphs", ["data.name=mine"]), ("omniglot_background", [])):
        with pytest.raises(PipelineError, match="not registered"):
            demo(compose("demo", [f"data={file}", *given, f"data.root={tmp_path}"]))
        assert asked[-2] == ("ingest", f"data={file}", *given, f"data.root={tmp_path}")
        assert asked[-1][1 : len(asked[-2])] == asked[-2][1:]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_from_nothing_to_classified_images(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.demo", "--json"],
        env={**os.environ, "PIPELINE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    trained, untrained = [e for e in summary["evaluation"] if (e["way"], e["shot"]) == (5, 1)]
    assert (trained["model"], untrained["model"]) == (summary["run"], "untrained")
    assert trained["accuracy"] - trained["interval"] > untrained["accuracy"] + untrained["interval"] + 0.05
    right = sum(answer["label"] == Path(answer["file"]).parent.name for answer in summary["answers"])
    assert right >= 8, done.stderr
    assert "What to look at next" in done.stderr
