"""Writing datasets: exact statistics, stable bytes, and nothing half written that looks like a dataset."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.dataset import Dataset, read_manifest
from pipeline.data.write import ClassSums, Target, row_sums, write_dataset
from pipeline.errors import PipelineError

SPLITS = {"train": ["c", "a"], "val": ["b"], "test": ["d"]}


def some_classes(seed: int = 0, shape: tuple[int, int, int] = (3, 5, 4)) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    counts = {"a": 7, "b": 1, "c": 12, "d": 3}
    return {name: generator.integers(0, 256, (n, *shape), dtype=np.uint8) for name, n in counts.items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_hint_is_the_command_that_makes_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path))
    with pytest.raises(PipelineError, match="make it with: python -m jobs.ingest data=glyphs$"):
        read_manifest(f"{tmp_path}/datasets/glyphs")
    with pytest.raises(PipelineError, match="jobs.ingest data=folder data.name=shop data.source.path=FOLDER$"):
        read_manifest(f"{tmp_path}/datasets/shop")
    with pytest.raises(PipelineError, match=f"jobs.ingest data=cifar_fs 'data.root={tmp_path}/my sets'$"):
        read_manifest(f"{tmp_path}/my sets/cifar_fs")


def test_rows_come_back_in_the_order_of_the_classes(tmp_path: Path) -> None:
    classes = some_classes()
    manifest = write_dataset(str(tmp_path / "set"), "set", classes.items(), SPLITS, shard_bytes=60 * 5)
    assert [shard.rows for shard in manifest.shards] == [5, 5, 5, 5, 3]
    dataset = Dataset(str(tmp_path / "set"))
    assert dataset.manifest == manifest
    np.testing.assert_array_equal(dataset.gather(np.arange(manifest.rows)), np.concatenate(list(classes.values())))
    assert manifest.class_counts == [7, 1, 12, 3]
    assert manifest.splits == {"train": [2, 0], "val": [1], "test": [3]}
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_statistics_are_those_of_the_train_split_in_float64(tmp_path: Path) -> None:
    classes = some_classes()
    manifest = write_dataset(str(tmp_path / "set"), "set", classes.items(), SPLITS)
    train = np.concatenate([classes["a"], classes["c"]]).astype(np.float64) / 255
    np.testing.assert_allclose(manifest.mean, train.mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(manifest.std, train.std(axis=(0, 2, 3)), rtol=1e-13)


def test_sums_are_exact_for_the_brightest_images() -> None:
    white = np.full((2, 1, 200, 200), 255, dtype=np.uint8)
    total, squares = row_sums(white)
    assert total.tolist() == [[255 * 40_000]] * 2
    assert squares.tolist() == [[255**2 * 40_000]] * 2
    assert ClassSums.of(1, np.zeros(2, dtype=int), total, squares).mean_and_std([0], 40_000) == ([1.0], [0.0])


def test_bytes_do_not_depend_on_the_parts_in_which_rows_arrive(tmp_path: Path) -> None:
    classes = some_classes()
    write_dataset(str(tmp_path / "whole"), "set", classes.items(), SPLITS, shard_bytes=300)
    parts = [(name, images[n : n + 2]) for name, images in classes.items() for n in range(0, len(images), 2)]
    write_dataset(str(tmp_path / "parts"), "set", parts, SPLITS, shard_bytes=300)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "parts")


def test_an_existing_dataset_is_replaced_only_when_asked(tmp_path: Path) -> None:
    uri = str(tmp_path / "set")
    first = write_dataset(uri, "set", some_classes(0).items(), SPLITS)
    with pytest.raises(PipelineError, match="overwrite=true"):
        write_dataset(uri, "set", some_classes(1).items(), SPLITS)
    assert read_manifest(uri) == first

    def others():
        yield from some_classes(1).items()
        np.testing.assert_array_equal(Dataset(uri).gather(np.arange(7)), some_classes(0)["a"])  # still the old one

    second = write_dataset(uri, "set", others(), SPLITS, overwrite=True)
    assert second.fingerprint != first.fingerprint
    np.testing.assert_array_equal(Dataset(uri).gather(np.arange(7)), some_classes(1)["a"])
    assert set(files_of(Path(uri))) == {"manifest.json", *(shard.file for shard in second.shards)}
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    def failing():
        yield "a", some_classes()["a"]
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="on fire"):
        write_dataset(str(tmp_path / "set"), "set", failing(), SPLITS, shard_bytes=100)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PipelineError, match="'val' of dataset 'set' names class 'b'"):
        write_dataset(str(tmp_path / "set"), "set", [("c", some_classes()["c"]), ("a", some_classes()["a"])], SPLITS)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
import numpy as np
from pipeline.data.write import write_dataset
def classes():
    yield "a", np.ones((8, 1, 4, 4), np.uint8)
    os.kill(os.getpid(), signal.SIGKILL)
write_dataset(sys.argv[1], "set", classes(), {}, shard_bytes=32, overwrite=True)
"""


def test_a_killed_writer_leaves_no_dataset_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    uri = str(tmp_path / "set")
    killed = subprocess.run([sys.executable, "-c", KILLED, uri], cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".set.partial"]
    assert any(path.suffix == ".arrow" for path in (tmp_path / ".set.partial").iterdir())
    with pytest.raises(PipelineError, match=r"no dataset at .*moved, give dataset= or data.root=.*; or make it with: "):
        read_manifest(uri)
    write_dataset(uri, "set", some_classes().items(), SPLITS)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    Dataset(uri)


def test_two_writers_of_one_dataset_do_not_meet(tmp_path: Path) -> None:
    uri = str(tmp_path / "set")
    first = Target(uri)
    with pytest.raises(PipelineError, match="being written by another process"):
        Target(uri)
    first.abort()
    Target(uri).abort()
    assert list(tmp_path.iterdir()) == []


def test_images_of_another_shape_are_refused(tmp_path: Path) -> None:
    classes = [("a", np.zeros((1, 1, 4, 4), np.uint8)), ("b", np.zeros((1, 1, 9, 9), np.uint8))]
    with pytest.raises(PipelineError, match=r"class 'b' are uint8 \[1, 9, 9\], not uint8 \[1, 4, 4\]"):
        write_dataset(str(tmp_path / "set"), "set", classes, {"train": ["a", "b"]})


def test_an_altered_shard_is_refused_by_name(tmp_path: Path) -> None:
    uri = str(tmp_path / "set")
    manifest = write_dataset(uri, "set", some_classes().items(), SPLITS)
    path = Path(uri) / manifest.shards[0].file
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(PipelineError, match=manifest.shards[0].file):
        Dataset(uri)


def test_an_altered_manifest_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "set")
    write_dataset(uri, "set", some_classes().items(), SPLITS)
    path = Path(uri) / "manifest.json"
    content = json.loads(path.read_text())
    content["splits"]["test"], content["splits"]["val"] = content["splits"]["val"], content["splits"]["test"]
    path.write_text(json.dumps(content))
    with pytest.raises(PipelineError, match="altered"):
        read_manifest(uri)
    assert os.listdir(tmp_path) == ["set"]
