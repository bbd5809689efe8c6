"""A folder of images that grows, and the command that looks at it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.sources.glyphs import draw_glyphs

IMAGES = 12  # of a class


def class_name(number: int) -> str:
    return f"glyph{number:04d}"


def add_classes(folder: Path, numbers: Sequence[int], images: int = IMAGES, first: int = 0) -> Path:
    """Class folders of drawings, as PNG."""
    for number, drawings in zip(numbers, draw_glyphs(np.asarray(numbers), images, 28, 0, first), strict=True):
        (folder / class_name(number)).mkdir(parents=True, exist_ok=True)
        for position, drawing in enumerate(drawings):
            Image.fromarray(drawing[0]).save(folder / class_name(number) / f"{first + position:03d}.png")
    return folder


def spoil(folder: Path, names: Sequence[str], seed: int = 0) -> None:
    """Shuffle the images of these classes among them: their labels mean nothing any more."""
    files = [path for name in names for path in sorted((folder / name).iterdir())]
    content = [path.read_bytes() for path in files]
    for path, position in zip(files, np.random.default_rng(seed).permutation(len(files)), strict=True):
        path.write_bytes(content[position])


def arguments(home: Path, *more: str) -> list[str]:
    """Of ``jobs.retrain``: a small network, few steps, everything below ``home``."""
    return [
        "data=folder", "data.name=growing", f"data.root={home}/datasets", f"data.source.path={home}/images",
        "data.source.shape=[1,28,28]", "data.source.fractions={train: 0.4, val: 0.3, test: 0.3}",
        f"storage={home}/runs", f"tracking.uri=sqlite:///{home}/mlflow.db", f"tracking.artifacts={home}/artifacts",
        "register_as=people", "backbone.width=8", "steps=8", "train.query=5", "train.meta_batch_size=1",
        "cluster.workers=1",
        "validation.every=4", "validation.episodes=20", "validation.query=5", "checkpoint.every=4", "evaluation=null",
        "retrain.promotion.episodes=40", "retrain.promotion.query=5", "retrain.shard_mb=1", *more,
    ]  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, empty_database: Path) -> Path:
    """Where a retraining keeps everything, with images of 24 classes."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    add_classes(tmp_path / "images", range(24))
    return tmp_path


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Making the tables takes seconds: they are made once and copied."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path
