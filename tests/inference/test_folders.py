"""Images from files of all kinds, and the ones that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.inference.folders import read_images, read_queries, read_support


def save(path: Path, value: int, mode: str = "L", size: tuple[int, int] = (20, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).convert(mode).save(path)
    return path


def test_sizes_modes_and_formats(tmp_path: Path) -> None:
    files = [
        save(tmp_path / "a.png", 100),
        save(tmp_path / "b.jpg", 100, size=(50, 31)),
        save(tmp_path / "c.bmp", 100, "RGB"),
        save(tmp_path / "d.webp", 100, "RGBA", (9, 200)),
    ]
    pictures = read_images(files, (1, 20, 20))
    assert pictures.files == files and pictures.images.shape == (4, 1, 20, 20) and not pictures.skipped
    assert np.abs(pictures.images.astype(int) - 100).max() <= 3
    np.testing.assert_array_equal(read_images(files, (1, 20, 20), invert=True).images, 255 - pictures.images)
    assert read_images(files[:1], (3, 8, 8)).images.shape == (1, 3, 8, 8)


def test_broken_files_are_listed(tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", 10)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    for name, content in {
        "cut.png": (tmp_path / "whole.png").read_bytes()[:900],
        "empty.png": b"",
        "text.jpg": b"hi",
    }.items():
        (tmp_path / name).write_bytes(content)
    Image.new("1", (10_000, 9_000)).save(tmp_path / "whole.png")
    pictures = read_images(sorted(tmp_path.iterdir()), (1, 8, 8))
    assert pictures.files == [good]
    assert [file.name for file, _ in pictures.skipped] == ["cut.png", "empty.png", "text.jpg", "whole.png"]
    assert all(reason and "\n" not in reason for _, reason in pictures.skipped)


def test_support_is_a_folder_a_class(tmp_path: Path) -> None:
    for name in ("bob/1.png", "ann/2.png", "ann/deep/1.png", ".hidden/1.png", "ann/.DS_Store.png"):
        save(tmp_path / name, 5)
    pictures, labels = read_support(tmp_path, (1, 8, 8))
    assert labels == ["ann", "ann", "bob"]
    assert [file.relative_to(tmp_path).as_posix() for file in pictures.files] == [
        "ann/2.png",
        "ann/deep/1.png",
        "bob/1.png",
    ]
    (tmp_path / "eve").mkdir()
    (tmp_path / "eve" / "1.png").write_bytes(b"no image")
    with pytest.raises(PipelineError, match="no image of class 'eve' can be read"):
        read_support(tmp_path, (1, 8, 8))
    with pytest.raises(PipelineError, match="it has no sub-folders"):
        read_support(tmp_path / "bob", (1, 8, 8))
    with pytest.raises(PipelineError, match="no such folder"):
        read_support(tmp_path / "nobody", (1, 8, 8))


def test_queries_are_files_and_folders(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.png", "a.png"):
        save(tmp_path / name, 5)
    names = [file.name for file in read_queries([tmp_path / "b", tmp_path / "a.png"], (1, 8, 8)).files]
    assert names == ["1.png", "2.png", "a.png"]
    assert len(read_queries(str(tmp_path), (1, 8, 8)).files) == 3
    (tmp_path / "none").mkdir()
    for place, message in [(tmp_path / "none", "no files in it"), ("nowhere", "no such file or folder")]:
        with pytest.raises(PipelineError, match=message):
            read_queries(place, (1, 8, 8))
