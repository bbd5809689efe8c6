"""Ingest on Ray Data: equal bytes on any number of workers, everything skipped is told, nothing half made stays."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import store
from pipeline.config import compose
from pipeline.data.dataset import Dataset, read_manifest
from pipeline.data.download import download
from pipeline.data.images import decode
from pipeline.data.ingest import SKIPPED_NAME, _kept_splits, ingest
from pipeline.data.ingest_tasks import Layout, rewrite, write_order
from pipeline.data.sources.base import Chunk
from pipeline.data.sources.glyphs import draw_glyphs
from pipeline.data.write import write_dataset
from pipeline.errors import PipelineError

ROOT = Path(__file__).resolve().parents[2]


def glyphs(root: object, name: str = "glyphs", **options: Any) -> dict[str, Any]:
    source = {"kind": "glyphs", "classes": 24, "per_class": 5, "size": 16, **options}
    return {"data": {"name": name, "root": str(root), "source": source}}


def test_classes_whose_names_an_archive_hid_keep_their_splits(glyphs: str, tmp_path: Path) -> None:
    """Earlier code read UTF-8 as code page 437 where the archive did not say that it is: "cafe╠ü" was "café"."""
    manifest, garbled = read_manifest(glyphs), "cafe\u0301".encode().decode("cp437")
    names = [garbled, *manifest.class_names[1:]]
    store.write_bytes(f"{tmp_path}/manifest.json", replace(manifest, class_names=names).to_json().encode())
    kept = _kept_splits(SimpleNamespace(current=str(tmp_path)), print)
    assert kept["café"] == kept[garbled] == "train" and len(kept) == len(names) + 1



def folder(root: object, path: Path, source: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    settings = {"kind": "folder", "path": str(path), "shape": [3, 8, 8], **(source or {})}
    return {"data": {"name": "mine", "root": str(root), "source": settings}, **options}


def make_folder(path: Path, classes: int = 4, images: int = 30) -> Path:
    """Class folders of random PNGs."""
    for number in range(classes):
        (path / f"class {number}").mkdir(parents=True)
        for image in range(images):
            pixels = np.random.default_rng(1000 * number + image).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / f"class {number}" / f"{image:03d}.png")
    return path


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_ingested_glyphs_are_the_drawn_ones(ray_session: Any, tmp_path: Path) -> None:
    manifest = ingest(glyphs(tmp_path), progress=False)
    dataset = Dataset(str(tmp_path / "glyphs"))
    assert dataset.manifest == manifest and manifest.rows == 120
    drawn = draw_glyphs(range(24), per_class=5, size=16)
    np.testing.assert_array_equal(dataset.gather(np.arange(120)), drawn.reshape(120, 1, 16, 16))
    train = drawn[manifest.splits["train"]].astype(np.float64) / 255
    assert manifest.mean == pytest.approx([train.mean()]) and manifest.std == pytest.approx([train.std()])
    assert {path.name for path in tmp_path.iterdir()} == {"glyphs"}


def test_ingest_equals_the_plain_writer(ray_session: Any, tmp_path: Path) -> None:
    manifest = ingest(glyphs(tmp_path), progress=False)
    images = draw_glyphs(range(24), per_class=5, size=16)
    splits = {split: [manifest.class_names[n] for n in members] for split, members in manifest.splits.items()}
    written = write_dataset(str(tmp_path / "plain"), "glyphs", zip(manifest.class_names, images, strict=True), splits)
    assert written.fingerprint == manifest.fingerprint


def test_many_shards_keep_the_order_of_rows(ray_session: Any, tmp_path: Path) -> None:
    """Shards of 1 MiB make chunks of 256 of these images, and 4 chunks or so a shard."""
    config = {**glyphs(tmp_path, classes=200, per_class=30, size=32), "shard_mb": 1}
    manifest = ingest(config, progress=False)
    assert len(manifest.shards) >= 5
    rows = Dataset(str(tmp_path / "glyphs")).gather(np.arange(6000))
    np.testing.assert_array_equal(rows, draw_glyphs(range(200), per_class=30, size=32).reshape(6000, 1, 32, 32))


IN_ANOTHER_RAY = """
import json, sys
from pipeline.data.ingest import ingest
print(ingest(json.loads(sys.argv[1]), progress=False).fingerprint)
"""


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_number_of_workers(ray_session: Any, tmp_path: Path) -> None:
    images = make_folder(tmp_path / "in", classes=6, images=400)
    (images / "class 1" / "000.png").write_bytes(b"broken")
    shutil.copy(images / "class 2" / "000.png", images / "class 3" / "again.png")
    config = folder(tmp_path / "here", images, {"shape": [3, 32, 32]}, shard_mb=1)
    manifest = ingest(config, progress=False)
    assert len(manifest.shards) > 3
    config["data"]["root"] = str(tmp_path / "there")
    config["cpus"] = 1
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", IN_ANOTHER_RAY, json.dumps(config)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == manifest.fingerprint
    assert files_of(tmp_path / "here" / "mine") == files_of(tmp_path / "there" / "mine")


def test_what_is_skipped_is_counted_and_listed(ray_session: Any, tmp_path: Path) -> None:
    images = make_folder(tmp_path / "in")
    (images / "class 0" / "empty.png").write_bytes(b"")
    (images / "class 0" / "text.png").write_bytes(b"hello")
    content = (images / "class 1" / "003.png").read_bytes()
    (images / "class 1" / "cut.png").write_bytes(content[:-60])
    (images / "class 1" / "twin.png").write_bytes(content)
    (images / "class 3" / "stranger.png").write_bytes(content)
    (images / "class 2" / ".hidden").write_bytes(b"")
    expected = {
        "duplicate_across_classes": 1,
        "duplicate_in_class": 1,
        "hidden": 1,
        "truncated": 1,
        "unreadable": 1,
        "zero_size": 1,
    }
    manifest = ingest(folder(tmp_path, images), progress=False)
    assert manifest.skipped == expected and manifest.rows == 120 and manifest.class_counts == [30] * 4
    listed = json.loads((tmp_path / "mine" / SKIPPED_NAME).read_text())
    assert listed["left_out"] == expected and len(listed["files"]) == 6
    (stranger,) = [entry for entry in listed["files"] if entry["reason"] == "duplicate_across_classes"]
    assert stranger["file"] == "class 3/stranger.png" and "class 1/003.png" in stranger["detail"]
    rows = Dataset(str(tmp_path / "mine")).gather(np.arange(120))
    for row, path in ((0, "class 0/000.png"), (33, "class 1/003.png"), (119, "class 3/029.png")):
        np.testing.assert_array_equal(rows[row], decode((images / path).read_bytes(), (3, 8, 8)))

    kept = ingest(folder(tmp_path, images, {"keep_duplicates": True}, overwrite=True), progress=False)
    assert kept.rows == 122 and "duplicate_in_class" not in kept.skipped
    listed = json.loads((tmp_path / "mine" / SKIPPED_NAME).read_text())
    assert listed["kept"] == {"duplicate_across_classes": 1, "duplicate_in_class": 1}


def test_statistics_leave_duplicates_out(ray_session: Any, tmp_path: Path) -> None:
    images = make_folder(tmp_path / "in")
    clean = ingest(folder(tmp_path / "clean", images), progress=False)
    for number in range(3):
        shutil.copy(images / f"class {number}" / "000.png", images / f"class {number}" / "zz.png")
    again = ingest(folder(tmp_path / "again", images), progress=False)
    assert again.fingerprint == clean.fingerprint
    assert set(files_of(tmp_path / "again" / "mine")) == set(files_of(tmp_path / "clean" / "mine"))


def test_too_many_unusable_files_are_refused_and_nothing_stays(ray_session: Any, tmp_path: Path) -> None:
    images = make_folder(tmp_path / "in", images=10)
    for number in range(3):
        (images / "class 0" / f"x{number}.png").write_bytes(b"hello %d" % number)
    with pytest.raises(
        PipelineError, match=r"3 of 43 files cannot be used, more than max_skipped_fraction=0.05: 3 unread"
    ):
        ingest(folder(tmp_path / "out", images), progress=False)
    assert list((tmp_path / "out").iterdir()) == []
    assert ingest(folder(tmp_path / "out", images, max_skipped_fraction=0.07), progress=False).rows == 40


def test_a_class_without_usable_images_is_named(ray_session: Any, tmp_path: Path) -> None:
    images = make_folder(tmp_path / "in", classes=8, images=30)
    for path in (images / "class 7").iterdir():
        path.unlink() if path.name != "000.png" else path.write_bytes(b"hello")
    manifest = ingest(folder(tmp_path, images, {"fractions": {"train": 0.75, "test": 0.25}}), progress=False)
    assert "class 7" not in manifest.class_names and manifest.skipped == {"empty_class": 1, "unreadable": 1}


def test_hostile_input_is_refused_in_one_line(ray_session: Any, tmp_path: Path) -> None:
    images = make_folder(tmp_path / "in", images=3)
    Image.new("L", (20_000, 10_000)).save(images / "class 2" / "bomb.png")
    with pytest.raises(PipelineError, match=r"1 too_large; the first is class 2/bomb.png \(20000 x 10000") as refusal:
        ingest(folder(tmp_path / "out", images), progress=False)
    assert "\n" not in str(refusal.value)
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../../evil.png", b"x")
    with pytest.raises(PipelineError, match="'../../evil.png' leads out of its folder"):
        ingest(folder(tmp_path / "out", tmp_path / "evil.zip"), progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_encoded_images_are_decoded_by_the_dataset(ray_session: Any, tmp_path: Path) -> None:
    images = tmp_path / "in"
    for number in range(3):
        (images / str(number)).mkdir(parents=True)
        for image in range(5):
            pixels = np.random.default_rng(10 * number + image).integers(0, 256, (60, 50 + image, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / str(number) / f"{image}.jpg")
    raw = ingest(folder(tmp_path / "raw", images), progress=False)
    files = ingest(folder(tmp_path / "files", images, {"encoding": "encoded"}), progress=False)
    assert (raw.mean, raw.std) == (files.mean, files.std) and files.encoding == "encoded"
    rows = np.arange(15)
    np.testing.assert_array_equal(
        Dataset(str(tmp_path / "raw" / "mine")).gather(rows), Dataset(str(tmp_path / "files" / "mine")).gather(rows)
    )


def test_an_existing_dataset_is_refused_before_any_work(tmp_path: Path) -> None:
    write_dataset(str(tmp_path / "glyphs"), "glyphs", [("a", np.zeros((2, 1, 4, 4), np.uint8))], {"train": ["a"]})
    with pytest.raises(PipelineError, match="overwrite=true"):
        ingest(glyphs(tmp_path), progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_skipped_fraction": 2.0}, "max_skipped_fraction"),
        ({"overwrit": True}, "unknown key 'overwrit'; did you mean 'overwrite'"),
        ({"cpus": 0}, "cpus"),
    ],
)
def test_impossible_keys_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        ingest({**glyphs(tmp_path), **change}, progress=False)
    with pytest.raises(PipelineError, match="data.name"):
        ingest(glyphs(tmp_path, name="../up"), progress=False)


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "pipeline/conf/data").glob("*.yaml"))])
def test_every_data_config_composes_and_its_keys_are_the_sources(name: str, tmp_path: Path) -> None:
    from pipeline.data.sources.by_kind import make_source

    config = compose("ingest", [f"data={name}"])
    assert config["data"]["name"] == name
    if name == "features":
        with pytest.raises(PipelineError, match="features are made by python -m jobs.embed"):
            make_source(config["data"]["source"])
        return
    path = config["data"]["source"].get("path", "")
    if path is None and name.partition("_")[0] != "omniglot":
        with pytest.raises(PipelineError, match="data.source.path must be given"):
            make_source(config["data"]["source"])
        config["data"]["source"]["path"] = str(tmp_path)
    make_source(config["data"]["source"])


def test_every_key_is_explained_where_it_stands() -> None:
    for path in [ROOT / "pipeline/conf/ingest.yaml", *sorted((ROOT / "pipeline/conf/data").glob("*.yaml"))]:
        for line in path.read_text().splitlines():
            key = line.split("#")[0].strip()
            if ":" in key and not key.startswith("-") and key.split(":")[0] not in ("defaults", "kind", "source"):
                assert "#" in line, f"{path.name}: {line}"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server with one bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(key, value)
    boto3.client("s3").create_bucket(Bucket="sets")
    yield "s3://sets/all"
    server.stop()


def test_a_dataset_in_an_object_store(bucket: str, tmp_path: Path) -> None:
    """Replaced without a moment in which it is not whole; what a killed writer left is removed."""
    uri = f"{bucket}/set"

    def some(seed: int) -> list[tuple[str, np.ndarray]]:
        random = np.random.default_rng(seed)
        return [(name, random.integers(0, 256, (9, 1, 8, 8), dtype=np.uint8)) for name in ("a", "b")]

    store.write_bytes(f"{uri}/shard-0123456789abcdef.arrow", b"left by a killed writer")
    with pytest.raises(PipelineError, match="no dataset at"):
        read_manifest(uri)
    first = write_dataset(uri, "set", some(0), {"train": ["a"], "test": ["b"]}, shard_bytes=300)
    names = {"manifest.json", *(shard.file for shard in first.shards)}
    assert set(store.list_names(uri)) == names and len(first.shards) > 3
    with pytest.raises(PipelineError, match="overwrite=true"):
        write_dataset(uri, "set", some(1), {"train": ["a"], "test": ["b"]})

    def failing() -> Iterator[tuple[str, np.ndarray]]:
        yield from some(2)
        raise OSError("power cut")

    with pytest.raises(OSError, match="power cut"):
        write_dataset(uri, "set", failing(), {"train": ["a"]}, shard_bytes=300, overwrite=True)
    assert set(store.list_names(uri)) == names
    second = write_dataset(uri, "set", some(1), {"train": ["a"], "test": ["b"]}, overwrite=True)
    assert set(store.list_names(uri)) == {"manifest.json", *(shard.file for shard in second.shards)}
    dataset = Dataset(uri, cache=str(tmp_path / "cache"))
    np.testing.assert_array_equal(dataset.gather(np.arange(9, 18)), some(1)[1][1])


def job(root: str, *overrides: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.ingest", f"data.root={root}", "cpus=2", "object_store_mb=200", *overrides]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_the_job_ingests_to_an_object_store(bucket: str, tmp_path: Path) -> None:
    process = job(bucket, "data.source.classes=24", "--json")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    summary = json.loads(output)
    manifest = read_manifest(f"{bucket}/glyphs")
    assert summary["fingerprint"] == manifest.fingerprint and summary["images"] == manifest.rows == 480
    rows = Dataset(f"{bucket}/glyphs", cache=str(tmp_path)).gather(np.arange(480))
    np.testing.assert_array_equal(rows, draw_glyphs(range(24)).reshape(480, 1, 28, 28))
    assert SKIPPED_NAME in store.list_names(f"{bucket}/glyphs")


@pytest.mark.slow
def test_a_killed_ingest_leaves_nothing_that_looks_like_a_dataset(tmp_path: Path) -> None:
    process = job(str(tmp_path), "data.source.classes=20000", "shard_mb=1", start_new_session=True)
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob(".glyphs.partial/shard-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert [path.name for path in tmp_path.iterdir()] == [".glyphs.partial"]
    with pytest.raises(PipelineError, match="no dataset at"):
        read_manifest(str(tmp_path / "glyphs"))


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for root, why in (("/etc/hostname", "Not a directory"), ("/proc/nope", "No such file"), ("/dev/null", "Not a dir")):
        with pytest.raises(PipelineError, match=rf"^{root}/glyphs cannot be written \({why}.*give another data.root"):
            ingest(glyphs(root), progress=False)
    with pytest.raises(PipelineError, match="/file is a file; give another data.name or data.root"):
        ingest(glyphs(tmp_path, name="file"), progress=False)
    with pytest.raises(PipelineError, match=r"cannot be written \(File exists\); give another data.source.cache"):
        download("http://127.0.0.1:9/x.zip", tmp_path / "file" / "x.zip", "0" * 32)


def test_a_full_disk_is_one_line_wherever_it_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a task, which hands it to the driver as text, and where the manifest is written."""
    layout = Layout((1, 4, 4), "raw", 8, 1, 8)
    chunk = Chunk(np.zeros((2, 1, 4, 4), np.uint8), np.zeros(2, np.int32), ["a", "b"], [b"1", b"2"])
    source = SimpleNamespace(read=lambda order, rows: iter([chunk]))
    batch = {"number": np.asarray([0]), "order": np.asarray([pickle.dumps(None)], dtype=object)}
    [whole] = write_order(batch, source, layout, str(tmp_path), None)["written"]
    assert pickle.loads(whole).shard.rows == 2

    def full(path: str, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_atomic", full)
    [refused] = write_order(batch, source, layout, str(tmp_path), None)["written"]
    assert re.match("the disk of .* is full: free space there", pickle.loads(refused))
    work = {"work": np.asarray([pickle.dumps((pickle.loads(whole), np.asarray([False, True])))], dtype=object)}
    [refused] = rewrite(work, layout, str(tmp_path), None)["written"]
    assert re.match("the disk of .* is full: free space there", pickle.loads(refused))
    with pytest.raises(PipelineError, match="the disk of .* is full"):
        write_dataset(str(tmp_path / "x"), "x", [("a", np.zeros((2, 1, 4, 4), np.uint8))], {"train": ["a"]})


def test_a_missing_bucket_is_named(bucket: str) -> None:
    for call in (lambda: ingest(glyphs("s3://nowhere/all"), progress=False), lambda: read_manifest("s3://nowhere/x")):
        with pytest.raises(PipelineError, match="there is no bucket 'nowhere' at this object store"):
            call()


def test_a_folder_as_people_have_them_by_the_command(tmp_path: Path) -> None:
    """Odd letters in every path, a folder of splits, what systems left in it, a pipe; one photograph too many."""
    images = tmp_path / "\u00e9t\u00e9, photos (1)"
    for number, name in enumerate(("train/a", "train/b", "val/c", "test/caf\u00e9")):
        make_folder(images / name, classes=1, images=8 + number)
        for path in (images / name / "class 0").iterdir():
            path.rename(images / name / f"{name[-1:]}{path.name}")
        (images / name / "class 0").rmdir()
    (images / "train" / "a" / "Thumbs.db").write_bytes(b"x")
    os.mkfifo(images / "val" / "c" / "pipe")
    given = [f"data.source.path={images}", "data.name=2024_11_28", "data.source.shape=[3,8,8]"]
    given.append("max_skipped_fraction=0.9")
    process = job(f"{tmp_path}/my, sets", "data=folder", *given)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    manifest = read_manifest(f"{tmp_path}/my, sets/2024_11_28")
    splits = {split: [manifest.class_names[n] for n in members] for split, members in manifest.splits.items()}
    assert splits == {"train": ["a", "b"], "val": ["c"], "test": ["caf\u00e9"]}
    assert "is a folder of splits: its classes stay where they lie (2 train, 1 val, 1 test)" in output
    assert "1 hidden, 1 no_file; listed in" in output


def test_the_job_ends_in_one_line_on_wrong_input(tmp_path: Path) -> None:
    process = job(str(tmp_path), "data=folder", f"data.source.path={tmp_path}/nowhere")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and output == ""
    assert errors.strip() == f"error: data.source.path={tmp_path}/nowhere: there is no such folder or zip archive"
