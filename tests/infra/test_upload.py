"""What ``ray job submit --working-dir .`` uploads, by Ray's own packaging."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_BEHIND = [
    "datasets/glyphs/shard-0.arrow",
    "runs/a-run/step_000010/model.safetensors",
    "mlflow.db",
    "mlflow.db-journal",
    "mlruns/1/meta.yaml",
    "mlartifacts/1/model/weights.safetensors",
    ".venv/bin/python",
    ".git/HEAD",
    ".mypy_cache/x.json",
    "pipeline/__pycache__/x.pyc",
    "tests/test_x.py",
    "docs/results/episode.png",
    "images_background.zip",
    "photos/mug/notes.txt",
    "my pictures/mug/IMG_0001.JPG",
    "my pictures/mug/scan.tiff",
    *(f"{folder}weights.{suffix}" for folder in ("", "downloads/") for suffix in ("pth", "pt", "ckpt", "onnx", "npz")),
    "features.npy",
    "old.tgz",
]
UPLOADED = [
    "pipeline/data/a.py",
    "pipeline/conf/data/glyphs.yaml",
    "pipeline/data/splits/x.json",
    "pipeline/data/photos/source.py",
    "jobs/train.py",
    "my_network.py",
    "docs/studies/benchmark/run.py",
]


def test_the_upload_is_the_code_alone(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    tree = tmp_path / "tree"
    for name in LEFT_BEHIND + UPLOADED:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    shutil.copy(ROOT / ".rayignore", tree)
    create_package(str(tree), tmp_path / "package.zip", include_gitignore=True)
    files = {name for name in zipfile.ZipFile(tmp_path / "package.zip").namelist() if not name.endswith("/")}
    assert files == {*UPLOADED, ".rayignore"}


def test_nothing_that_the_code_needs_stays_behind() -> None:
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    (left_out,) = get_excludes_from_ignore_files(ROOT, include_gitignore=False)
    needed = [file for folder in ("pipeline", "jobs") for file in (ROOT / folder).rglob("*.*")
              if file.suffix in {".py", ".yaml", ".json", ".html", ".css", ".js"}]  # fmt: skip
    assert len(needed) > 100 and not [file for file in needed if left_out(file)]
