"""The project's studies of itself are no part of the package, and say so where there is no checkout."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from jobs import _studies
from jobs._main import run
from jobs._studies import study
from jobs.report import dispatch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("job", "function", "arguments"),
    [
        ("report", dispatch, ["what=results"]),
        ("benchmark", study("benchmark.run", "benchmark"), []),
        ("scale", study("scale", "scale"), []),
    ],
)
def test_an_installed_package_says_that_a_checkout_is_needed(job, function, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_studies, "CHECKOUT", tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(job, function, arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and "in a checkout of the repository" in said


def test_the_old_word_for_results_is_understood(capsys, monkeypatch):
    monkeypatch.setattr("docs.studies.results.pages", list)
    with pytest.raises(SystemExit) as ended:
        run("report", dispatch, ["readme"], word="what")
    assert ended.value.code == 0 and "what=readme is called results now" in capsys.readouterr().out


def test_the_package_imports_nothing_of_the_studies():
    for path in (ROOT / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[0] in ("docs", "tests") for name in names), path
