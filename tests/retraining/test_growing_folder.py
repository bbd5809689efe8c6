"""A folder that grows: what is new changes few shards, and the result is that of an ingest from nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.dataset import Dataset, read_manifest
from pipeline.data.ingest import ingest
from pipeline.data.manifest import Manifest
from pipeline.data.sources.files import MOST, cut_by_name
from pipeline.data.sources.splits import by_name
from pipeline.data.sources.tree import Entry
from pipeline.errors import PipelineError

FRACTIONS = {"train": 0.64, "val": 0.16, "test": 0.2}
SIZE = 128  # three channels of it are 48 KiB: a shard of 1/8 MiB holds 2 or 3 images


def put(folder: Path, numbers: Sequence[int], images: range = range(4)) -> Path:
    """Class folders of noise that nothing but their names decides."""
    for number in numbers:
        (folder / f"class {number:03d}").mkdir(parents=True, exist_ok=True)
        for image in images:
            pixels = np.random.default_rng([number, image]).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class {number:03d}" / f"{image:03d}.bmp")
    return folder


def grow(root: Path, images: Path, **source: Any) -> Manifest:
    settings = {"kind": "folder", "path": str(images), "shape": [3, SIZE, SIZE], "grows": True, **source}
    config = {"data": {"name": "set", "root": str(root), "source": settings}, "shard_mb": 1, "overwrite": True}
    return ingest(config, progress=False)


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the last change of every shard."""
    found = {path.name: path.stat() for path in folder.glob("shard-*.arrow")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".arrow"}


def test_new_classes_and_new_images_change_few_shards(ray_session: Any, tmp_path: Path) -> None:
    images = put(tmp_path / "in", range(0, 60, 2))
    first = grow(tmp_path / "sets", images)
    before = states(tmp_path / "sets" / "set")
    assert len(before) > 20

    assert grow(tmp_path / "sets", images) == first and states(tmp_path / "sets" / "set") == before  # nothing is new

    put(images, (7, 41))  # between the others
    put(images, (20,), range(4, 6))
    second = grow(tmp_path / "sets", images)
    after = states(tmp_path / "sets" / "set")
    assert set(after) == {shard.file for shard in second.shards} and second.fingerprint != first.fingerprint
    kept = {name: state for name, state in after.items() if name in before}
    assert kept == {name: before[name] for name in kept}  # neither written again nor renamed
    assert len(before) - 3 <= len(kept) < len(before)  # every addition falls into one shard

    assert second.class_counts[second.class_names.index("class 020")] == 6
    from_nothing = grow(tmp_path / "new", images)
    assert from_nothing == second and content(tmp_path / "new" / "set") == content(tmp_path / "sets" / "set")
    number = second.class_names.index("class 041")
    rows = Dataset(str(tmp_path / "sets" / "set")).gather(second.class_starts[number] + np.arange(4))
    expected = [np.asarray(Image.open(images / "class 041" / f"{n:03d}.bmp")).transpose(2, 0, 1) for n in range(4)]
    np.testing.assert_array_equal(rows, np.stack(expected))

    for path in (images / "class 007").iterdir():  # and back again
        path.unlink()
    (images / "class 007").rmdir()
    third = grow(tmp_path / "sets", images)
    assert third == grow(tmp_path / "newer", images)
    assert not {name for name in third.class_names if name == "class 007"}
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["set"]


def test_old_classes_keep_their_splits(ray_session: Any, tmp_path: Path) -> None:
    images = put(tmp_path / "in", range(30), range(1))
    first = grow(tmp_path / "sets", images)
    second = grow(tmp_path / "sets", put(images, range(30, 90), range(1)))
    for split, members in first.splits.items():
        later = {second.class_names[number] for number in second.splits[split]}
        assert {first.class_names[number] for number in members} <= later


def test_duplicates_and_damage(ray_session: Any, tmp_path: Path) -> None:
    """An image that comes again in an earlier class is dropped from the shard that had it; damage is mended."""
    images = put(tmp_path / "in", range(10, 40))
    grow(tmp_path / "sets", images)
    (images / "class 001").mkdir()
    twin = (images / "class 025" / "001.bmp").read_bytes()
    (images / "class 001" / "twin.bmp").write_bytes(twin)
    put(images, (1,))
    second = grow(tmp_path / "sets", images)
    assert second.skipped == {"duplicate_across_classes": 1} and second.rows == 124
    assert second == grow(tmp_path / "new", images)
    Dataset(str(tmp_path / "sets" / "set"))

    damaged = tmp_path / "sets" / "set" / second.shards[3].file
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-40] + bytes(40))
    with pytest.raises(PipelineError, match="damaged"):
        Dataset(str(tmp_path / "sets" / "set"))
    assert grow(tmp_path / "sets", images) == second and damaged.read_bytes() == whole


def test_an_object_store_gets_only_what_is_new(ray_session: Any, moto_bucket: str, tmp_path: Path) -> None:
    import boto3

    def written(uri: str) -> dict[str, Any]:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        listed = boto3.client("s3", endpoint_url=endpoint).list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/shard-")
        return {item["Key"]: item["LastModified"] for item in listed["Contents"]}

    root = f"{moto_bucket}/growing"
    images = put(tmp_path / "in", range(0, 40, 2), range(2))
    settings = {"kind": "folder", "path": str(images), "shape": [3, SIZE, SIZE], "grows": True}
    config = {"data": {"name": "set", "root": root, "source": settings}, "shard_mb": 1, "overwrite": True}
    ingest(config, progress=False)
    before = written(f"{root}/set")
    put(images, (9,), range(2))
    second = ingest(config, progress=False)
    after = written(f"{root}/set")
    assert read_manifest(f"{root}/set") == second == grow(tmp_path / "new", images)
    kept = [key for key in after if key in before]
    assert len(after) - len(kept) in (1, 2) and all(after[key] == before[key] for key in kept)


def test_where_orders_begin_depends_on_the_names_around_alone() -> None:
    names = [f"c{number:04d}/{image}.png" for number in range(500) for image in range(4)]

    def orders(names: Sequence[str]) -> list[list[str]]:
        entries: dict[str, list[Entry]] = {}
        for name in names:
            entries.setdefault(name.split("/")[0], []).append(Entry(name, "", None))
        return [[row[2][0] for row in order] for order in cut_by_name(entries, sorted(entries), 20)]

    whole = orders(names)
    assert [name for order in whole for name in order] == names
    sizes = [len(order) for order in whole]
    assert 15 < np.mean(sizes) < 27 and max(sizes) <= MOST * 20
    for number in (0, 777, 1999):
        less = orders([name for name in names if name != names[number]])
        changed = [order for order in less if order not in whole]
        assert len(changed) <= 1
    assert orders([]) == []


def test_splits_by_name() -> None:
    names = [f"class {number}" for number in range(2000)]
    whole = by_name(names, FRACTIONS, 0)
    assert [round(len(members) / 2000, 1) for members in whole.values()] == [0.6, 0.2, 0.2]
    assert sorted(name for members in whole.values() for name in members) == sorted(names)
    few = by_name(names[:50], FRACTIONS, 0)
    assert all(set(few[split]) <= set(whole[split]) for split in FRACTIONS)
    assert by_name(names, FRACTIONS, 1) != whole
    assert sum(map(len, by_name(names, {"train": 0.5, "test": 0.1}, 0).values())) == pytest.approx(1200, abs=60)
    for count in range(3, 12):  # no split is empty, no class is lost or doubled
        for seed in range(20):
            drawn = by_name(names[:count], FRACTIONS, seed)
            assert all(drawn.values()) and sorted(sum(drawn.values(), [])) == sorted(names[:count])
    assert [len(v) for v in by_name(names[:3], {"train": 0.1, "val": 0.1, "test": 0.1}, 0).values()] == [1, 1, 1]
    for wrong in (["a", "b"], []):
        with pytest.raises(PipelineError, match="cannot fill the splits"):
            by_name(wrong, FRACTIONS, 0)
