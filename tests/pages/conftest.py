"""Pages of three tracking stores, made once: a full one, a hostile one and none at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.pages.build import make_pages
from tests.pages.stores import PAPERS, fill, fill_with_malice, tracking_in


@pytest.fixture(scope="session")
def database(tmp_path_factory) -> Path:
    """Making the tables takes seconds: they are made once and copied."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def pages_folder(database, glyphs, tmp_path_factory) -> Path:
    """Of a store with models and campaigns."""
    folder = tmp_path_factory.mktemp("pages")
    tracking = tracking_in(folder, database)
    fill(tracking, glyphs, folder / "runs")
    shutil.rmtree(folder / "runs")  # the store alone is enough
    made = make_pages(tracking, str(folder / "html"), PAPERS)
    assert made["problems"] == []
    return folder / "html"


@pytest.fixture(scope="session")
def evil_folder(database, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evil")
    tracking = tracking_in(folder, database)
    fill_with_malice(tracking)
    made = make_pages(tracking, str(folder / "html"))
    assert any("damaged" in problem for problem in made["problems"])
    return folder / "html"


@pytest.fixture(scope="session")
def empty_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("empty")
    tracking = {"uri": f"sqlite:///{folder}/none.db", "artifacts": None, "experiment": "few-shot", "timeout": 10}
    make_pages(tracking, str(folder / "html"))
    return folder / "html"
