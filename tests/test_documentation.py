"""Every command, path and program that the documents show: jobs compose and check, targets, options and files exist."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import jobs._main
import pipeline
from pipeline.config import compose, to_yaml, validate
from pipeline.data.ingest import IngestConfig
from pipeline.data.sources.by_kind import make_source
from pipeline.evaluation.protocols import EvaluateConfig
from pipeline.pages.report import ReportConfig
from pipeline.registry.classify import ClassifyConfig
from pipeline.registry.deliver import RegisterConfig
from pipeline.registry.export import ExportConfig
from pipeline.registry.promotion import PromoteConfig
from pipeline.registry.tracking_config import TrackingConfig, store_uri
from pipeline.retraining.config import settings_of
from pipeline.search.campaign import CampaignConfig
from pipeline.training import prepare, resume
from pipeline.training.config import TrainConfig
from pipeline.training.embed import EmbedConfig
from pipeline.training.paths import absolute
from pipeline.training.replay import ReplayConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/results/*.md"), *ROOT.glob("infra/**/*.md")]
)
SCHEMAS: dict[str, Any] = {
    "classify": ClassifyConfig, "embed": EmbedConfig, "evaluate": EvaluateConfig, "export": ExportConfig,
    "ingest": IngestConfig, "promote": PromoteConfig, "register": RegisterConfig, "replay": ReplayConfig,
    "report": ReportConfig, "train": TrainConfig, "tune": CampaignConfig,
}  # fmt: skip
PLACEHOLDER = re.compile(r"(?<![A-Za-z])[A-Z][A-Z_]{2,}(?![a-z])")
STANDS_FOR = {"NUMBER": "1", "NAME": "prototypical", "PHOTOS": "photos", "FOLDER": "photos"}
UNFINISHED = re.compile(r"…|\.\.\.|\[key=|KEY=|jobs\.[A-Z]")  # shows a form, and is no command


@cache
def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)


@cache
def commands(page: Path) -> list[str]:
    """Lines of shell blocks, joined where they go on, and what stands in the text as code."""
    shell = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.S))
    return [line.strip() for line in [*shell, *inline] if line.strip() and not UNFINISHED.search(line)]


def told(pattern: str) -> list[str]:
    """What ``pattern`` finds in the commands of all pages, each once."""
    return sorted({found[0] for page in PAGES for line in commands(page) if (found := re.search(pattern, line))})


JOB_LINES = told(r"(ray job submit .*|PYTHONPATH=\S+ )?python -m jobs\.\w+.*")
RAY_LINES = told(r"^ray [a-z].*")


def words_of(line: str) -> tuple[str, list[str]]:
    """The job of a command and its arguments, placeholders replaced."""
    line = re.split(r" && |; | \| ", line)[0]
    words = shlex.split(line[line.index("python -m jobs.") :], comments=True)
    return words[2].removeprefix("jobs."), [
        PLACEHOLDER.sub(lambda found: STANDS_FOR.get(found[0], found[0].lower()), word) for word in words[3:]
    ]


@pytest.fixture
def composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function from a job's arguments to the configuration that it would run with, by the job's own entry point."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "campaign").mkdir()
    (tmp_path / "campaign" / "my_search.yaml").write_text(blocks(ROOT / "docs" / "search.md", "yaml")[0])
    (tmp_path / "runs" / "campaign").mkdir(parents=True)
    (tmp_path / "runs" / "campaign" / "best.yaml").write_text(to_yaml(compose("train")))
    run, seen = jobs._main.run, {}

    def instead(job: str, function: Any, argv: Any = None, word: Any = None, translate: Any = list) -> None:
        run(job, lambda config: seen.update(config) or {}, arguments, word, translate)

    arguments: list[str] = []
    monkeypatch.setattr(jobs._main, "run", instead)

    def make(job: str, given: list[str]) -> dict[str, Any]:
        seen.clear()
        arguments[:] = given
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(f"jobs.{job}", run_name="__main__")
        assert ended.value.code == 0
        return dict(seen)

    return make


@pytest.mark.parametrize("line", JOB_LINES)
def test_a_job_composes_and_checks(line: str, composed, monkeypatch: pytest.MonkeyPatch) -> None:
    job, arguments = words_of(line)
    assert (ROOT / "jobs" / f"{job}.py").is_file()
    config = composed(job, arguments)
    if "--help" in arguments:
        return
    if not config.get("resume"):
        check(job, config)
    if line.startswith("ray job submit"):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        check_places(job, config, monkeypatch)


def check(job: str, config: dict[str, Any]) -> None:
    """What a job refuses before it starts Ray or reads a dataset."""
    if job in SCHEMAS:
        validate(SCHEMAS[job], config)
    if job == "retrain":
        settings_of({"register_as": "products", **config})
    if job == "ingest":
        make_source(config["data"]["source"])
    if job == "tune":
        validate(TrainConfig, compose("train", [*config["base"], *config["overrides"]]))


def check_places(job: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A submitted job's folder is thrown away: what it leaves lies elsewhere, its tracking store not on the head."""

    class Found(Exception):
        pass

    def found(*_: object) -> None:
        raise Found

    monkeypatch.setattr(resume, "find_run", found)
    monkeypatch.setattr(prepare, "read_manifest", found)
    if job == "train":
        with pytest.raises(Found):
            prepare.prepare(config)
    elif job == "ingest":
        absolute("data.root", config["data"]["root"])
    elif job == "tune":
        absolute("storage", config["storage"])
    if "tracking" in config and not config.get("resume") and config["tracking"]["uri"] is not None:
        assert "127.0.0.1" not in store_uri(validate(TrackingConfig, config["tracking"]))


@pytest.mark.parametrize("names", ["abcdefghijklmnopqrst", "uvwxyzABCDEFGHIJKLMN", "0123456789OPQRSTUVWX"])
def test_twenty_classes_are_enough_for_the_short_way(names: str, composed, tmp_path: Path) -> None:
    """Of whatever names: five are enrolled in an episode of validation, and five in one of the test."""
    [line] = [line for line in JOB_LINES if "data.source.encoding=encoded data.source.min_images=20" in line]
    for name in names:
        (tmp_path / "photos" / f"class {name}").mkdir()
        for number in range(20):
            (tmp_path / "photos" / f"class {name}" / f"{number}.jpg").touch()
    plan = make_source(composed(*words_of(line))["data"]["source"]).plan(100, print)
    assert [len(plan.splits[split]) for split in ("train", "val", "test")] == [8, 6, 6]


@pytest.mark.parametrize("line", RAY_LINES)
def test_ray_knows_the_command_and_its_options(line: str) -> None:
    from ray.scripts.scripts import cli

    words = shlex.split(line.split(" -- ")[0].split(" #")[0].rstrip("& "))[1:]
    group: Any = cli
    while words and isinstance(group, click.Group):
        name = words.pop(0)
        assert name in group.commands, f"ray has no command {name!r}"
        group = group.commands[name]
    known = {option for parameter in group.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("-"):
            assert word.split("=")[0] in known, f"{line}: no option {word}"
        elif word.endswith(".yaml"):
            assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"(?<![\w/.:-])((?:infra|pipeline|tests|jobs|docs)/[\w./*-]*\w)", text):
        assert list(ROOT.glob(PLACEHOLDER.sub("*", path))), path
    for target in re.findall(r"\bmake ([a-z-]+)", "\n".join(commands(page))):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M), target
    for module in re.findall(r"python -m ((?:tests|docs)\.[\w.]+)", text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_documents_lead_somewhere(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        target = page.parent / link if link else page
        titles = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.M)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert anchor in anchors, f"{link}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_can_be_read(page: Path) -> None:
    for block in blocks(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr + block
    for block in blocks(page, "yaml"):
        yaml.safe_load(block)
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "pipeline":
                assert {alias.name for alias in node.names} <= set(pipeline.__all__)


def test_the_worked_example_is_the_method_itself() -> None:
    page = ROOT / "docs" / "add_a_method.md"
    assert blocks(page, "python") == [(ROOT / "pipeline" / "methods" / "simple_shot.py").read_text()]
    assert blocks(page, "yaml") == [(ROOT / "pipeline" / "conf" / "method" / "simple_shot.yaml").read_text()]


def test_the_readme_names_every_method_and_backbone() -> None:
    text = (ROOT / "README.md").read_text()
    for group in ("method", "backbone"):
        for path in (ROOT / "pipeline" / "conf" / group).glob("*.yaml"):
            assert f"`{path.stem}`" in text, path.stem


def test_the_documents_are_found_and_the_readme_is_short() -> None:
    assert len(JOB_LINES) > 40 and len(RAY_LINES) > 10 and len(PAGES) > 15
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("wrong", ["python -m jobs.train stepz=3", "python -m jobs.evaluate run=RUN way=few"])
def test_a_wrong_command_would_be_found(wrong: str, composed, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.errors import PipelineError

    job, arguments = words_of(wrong)
    with pytest.raises((AssertionError, PipelineError)):
        check(job, composed(job, arguments))
    assert sys.modules["jobs._main"] is jobs._main
