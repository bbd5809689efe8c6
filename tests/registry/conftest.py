"""A run's folder as training leaves it, and a tracking store of its own for every test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import store
from pipeline.model import build_model
from pipeline.training.checkpoint import Checkpoint, save_checkpoint

SHAPE = (1, 16, 16)
SPEC = {
    "method": {"name": "prototypical"},
    "backbone": {"name": "conv4", "width": 8},
    "input": {"shape": list(SHAPE), "scaling": "unit"},
    "way": 5,
    "classes": 12,
}
DATASET = {"name": "glyphs", "fingerprint": "f" * 64, "uri": "s3://user:hunter2@host/glyphs?token=hunter2"}
CONFIG = {
    "seed": 3,
    "method": {"name": "prototypical", "scale": 1.0},
    "storage": "/somewhere/runs",
    "register_as": "people",
    "server": {"password": "hunter2", "api_key": "hunter2", "uri": "https://me:hunter2@host/path", "tokens": None},
    "validation": {"split": "val", "select": "best"},
    "lists": [1, [2, 3]],
}
RESULTS = [
    {"split": "test", "way": 5, "shot": 1, "query": 15, "episodes": 600, "seed": 7, "accuracy": 0.91, "interval": 0.01},
    {"split": "test", "way": 20, "shot": 5, "query": 5, "episodes": 100, "seed": 7, "accuracy": 0.82, "interval": 0.02},
]


def entry(step: int) -> dict[str, float]:
    figures = {"step": step, "train/loss": 2.0 / step}
    return figures if step % 4 else {**figures, "val/accuracy": 0.9 - abs(step - 8) / 100, "val/interval": 0.01}


def add_checkpoint(run: Path, step: int, seed: int = 0) -> Checkpoint:
    torch.manual_seed(seed + step)
    history = [entry(s) for s in range(1, step + 1)]
    checkpoint = Checkpoint(step, SPEC, CONFIG, DATASET, history[-1], history, build_model(SPEC).state_dict())
    save_checkpoint(run / f"step_{step:06d}", checkpoint)
    return checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "first-run"
    record = {"name": "first-run", "config": CONFIG, "spec": SPEC, "dataset": DATASET}
    store.write_bytes(str(folder / "run.json"), json.dumps(record).encode())
    for step in (4, 8, 12):
        add_checkpoint(folder, step)
    store.write_bytes(str(folder / "report" / "evaluation.json"), json.dumps(RESULTS).encode())
    return folder


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Making the tables takes seconds: they are made once and copied."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking(tmp_path: Path, empty_database: Path) -> dict:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return {
        "uri": f"sqlite:///{tmp_path}/mlflow.db",
        "artifacts": str(tmp_path / "artifacts"),
        "experiment": "tests",
        "timeout": 30,
    }


@pytest.fixture
def pictures() -> np.ndarray:
    """uint8 [12 classes, 6 images, 1, 16, 16]"""
    rng = np.random.default_rng(0)
    patterns = np.kron(rng.integers(0, 2, (12, 1, 1, 4, 4)) * 160, np.ones((4, 4)))
    return np.clip(patterns + rng.normal(40, 30, (12, 6, *SHAPE)), 0, 255).astype(np.uint8)
