"""What ``jobs.report`` does with a user's own runs: pages, and comparisons of trained extractors."""

from __future__ import annotations

from typing import Any

from pipeline import store
from pipeline.config import Config, validate
from pipeline.pages.build import make_pages
from pipeline.pages.compare import compare
from pipeline.pages.config import ReportConfig
from pipeline.pages.published import read_published


def report(raw: Config) -> dict[str, Any]:
    """Make the pages, or the comparison ``what``; with ``record`` its figures are written as JSON too."""
    config = validate(ReportConfig, raw)
    return _pages(config) if config.what == "pages" else compare(config)


def _pages(config: ReportConfig) -> dict[str, Any]:
    papers = read_published(config.published) if config.published else []
    output = config.output or "pages"
    store.check_folder(output, "output")
    found = make_pages(config.tracking.model_dump(), output, papers)
    for problem in found["problems"]:
        print(f"left out: {problem}")
    print(f"{len(found['pages'])} pages; begin with {found['index']}")
    return found
