"""Which classes are trained on and which tested: folders of splits, datasets that grow, classes that are too small."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.dataset import class_table, read_manifest
from pipeline.data.episodes import EpisodeSpec, check_spec
from pipeline.data.ingest import SKIPPED_NAME, _chosen, ingest
from pipeline.data.ingest_tasks import Rows
from pipeline.data.manifest import Manifest
from pipeline.data.sources.base import Plan
from pipeline.data.sources.folder import Folder
from pipeline.data.sources.splits import from_file
from pipeline.data.write import write_dataset
from pipeline.errors import PipelineError
from tests.data.test_sources import read_all


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def tree(root: Path, *classes: str, images: int = 2) -> Path:
    """A folder of classes, each with images of its own."""
    for name in classes:
        for number in range(images):
            save(root / name / f"{number}.png", zlib.crc32(f"{name} {number}".encode()))
    return root


def planned(source: Folder) -> tuple[Any, list[str]]:
    said: list[str] = []
    return source.plan(10, said.append), said


def test_folders_of_splits_with_their_own_classes_are_the_splits(tmp_path: Path) -> None:
    root = tree(tmp_path / "x" / "set", "Training/a", "Training/b", "valid/c", "test/d/small", "test/d/large")
    plan, said = planned(Folder(str(root), shape=[3, 8, 8]))
    assert plan.classes == ["a", "b", "c", "d/large", "d/small"]
    assert plan.splits == {"train": ["a", "b"], "val": ["c"], "test": ["d/large", "d/small"]}
    assert said == [
        f"data.source.path={root} is a folder of splits: its classes stay where they lie (2 train, 1 val, 2 test)"
    ]
    _, chunk = read_all(Folder(str(root), shape=[3, 8, 8], grows=True))
    assert len(chunk.images) == 10 and chunk.names[0] == "Training/a/0.png"


def test_folders_of_splits_with_the_same_classes_are_put_together(tmp_path: Path) -> None:
    """As for a classifier of known classes: few-shot learning draws whole classes for every split."""
    root = tree(tmp_path, *(f"{split}/{name}" for split in ("train", "val", "test") for name in ("cat", "cow", "dog")))
    plan, said = planned(Folder(str(root)))
    assert plan.classes == ["cat", "cow", "dog"] and plan.images == 18
    assert sorted(name for names in plan.splits.values() for name in names) == plan.classes
    [line] = said
    assert "folder of splits with the same 3 classes in train and val and test" in line


def test_classes_in_some_of_the_split_folders_are_refused_by_name(tmp_path: Path) -> None:
    root = tree(tmp_path, "train/cat", "train/cow", "val/emu", "test/cat", "test/dog")
    with pytest.raises(
        PipelineError, match=r"\(2 train, 1 val, 2 test\), but 'cat' is in more than one .*same_names=t"
    ):
        planned(Folder(str(root)))
    plan, said = planned(Folder(str(root), same_names=True))
    assert plan.classes == ["test/cat", "test/dog", "train/cat", "train/cow", "val/emu"] and not said


def test_the_same_product_is_not_trained_on_and_tested(tmp_path: Path) -> None:
    """Folders that are no splits, and a split file that leaks."""
    root = tree(tmp_path / "in", "batch 1/Cup", "batch 1/fork", "batch 2/cup", "batch 2/spoon", "shop/plate")
    with pytest.raises(PipelineError, match=r"class 'batch \d/[Cc]up' is for .* are they one class\?.*same_names=true"):
        for seed in range(9):  # one at least draws them apart
            planned(Folder(str(root), seed=seed))
    split = tmp_path / "s.json"
    split.write_text(json.dumps({"train": ["batch 1/Cup"], "test": ["batch 2/cup", "shop/plate"]}))
    with pytest.raises(PipelineError, match="'batch 1/Cup' is for train and 'batch 2/cup' for test"):
        planned(Folder(str(root), splits=str(split)))
    planned(Folder(str(root), splits=str(split), same_names=True))
    everywhere = tree(tmp_path / "other", "cat/images", "cow/images", "dog/images")
    assert planned(Folder(str(everywhere)))[0].classes == ["cat/images", "cow/images", "dog/images"]


def test_folders_that_are_no_splits_stay_part_of_the_name(tmp_path: Path) -> None:
    for classes, why in (
        (("train/a", "test/b", "other/c"), "test, train stand beside 'other'"),
        (("train/a", "train", "test/b"), "test, train hold images beside their classes (train)"),
        (("val/a", "valid/b", "test/c"), "test, val, valid name a split twice"),
    ):
        root = tree(tmp_path / why, *classes)
        plan, [said] = planned(Folder(str(root)))
        assert plan.classes == sorted(classes)
        assert f"the folders {why}, and are taken as a part of the classes' names, not as splits" in said


@pytest.mark.parametrize("grows", [True, False])
def test_a_class_keeps_the_split_that_it_has_in_the_dataset(tmp_path: Path, grows: bool) -> None:
    """Whatever fractions and seed say when the folder has grown."""
    old = [f"class {number:02}" for number in range(30)]
    root = tree(tmp_path, *old, images=1)
    first, _ = planned(Folder(str(root), grows=grows))
    kept = {name: split for split, names in first.splits.items() for name in names}
    tree(tmp_path, *(f"new {number:02}" for number in range(30)), images=1)
    for changed in (
        {},
        {"fractions": {"train": 0.2, "val": 0.4, "test": 0.4}},
        {"seed": 7},
        {"fractions": {"train": 0.9, "test": 0.1}},
    ):  # noqa: E501
        source = Folder(str(root), grows=grows, **changed)  # type: ignore[arg-type]
        source.kept = kept
        again, said = planned(source)
        now = {name: split for split, names in again.splits.items() for name in names}
        assert {name: now.get(name) for name in kept} == kept, changed
        assert len(now) == 60
        assert not changed or "stay in the split that they have in the dataset" in said[0]


@pytest.mark.parametrize("grown_first", [False, True])
def test_classes_keep_their_names_and_splits_when_the_folders_that_all_share_change(
    tmp_path: Path, grown_first: bool
) -> None:
    """A second folder beside the only one, an image between its classes; and the other way round."""
    animals = [f"animals/{number:02}" for number in range(10)]
    root = tree(tmp_path, *animals, images=1)
    stray = root / "animals" / "stray.png"

    def grow() -> None:
        tree(tmp_path, "plants/rose", "plants/lily", images=1)
        stray.write_bytes(next((root / animals[0]).iterdir()).read_bytes())

    def shrink() -> None:
        shutil.rmtree(root / "plants")
        stray.unlink()

    if grown_first:
        grow()
    first, _ = planned(Folder(str(root)))
    (shrink if grown_first else grow)()
    source = Folder(str(root))
    source.kept = {name: split for split, names in first.splits.items() for name in names}
    again, _ = planned(source)
    now = {name: split for split, names in again.splits.items() for name in names}
    assert {name: now[name] for name in source.kept if name in now} == {
        name: split for name, split in source.kept.items() if name in now
    }
    assert set(now) == (set(animals) if grown_first else {*source.kept, "animals", "plants/rose", "plants/lily"})


def test_two_folders_that_would_be_one_class_are_refused(tmp_path: Path) -> None:
    root = tree(tmp_path, "animals/cat", "animals/dog", "cat", images=1)
    source = Folder(str(root))
    source.kept = {"cat": "train", "dog": "test"}
    with pytest.raises(PipelineError, match="class 'cat'"):
        planned(source)


def test_given_splits_that_contradict_the_dataset_are_refused(tmp_path: Path) -> None:
    root = tree(tmp_path / "in", "train/a", "val/b", "test/c")
    split = tmp_path / "s.json"
    split.write_text(json.dumps({"train": ["train/a"], "val": ["val/b"], "test": ["test/c"]}))
    by_folders, by_file = Folder(str(root)), Folder(str(root), splits=str(split))
    by_folders.kept, by_file.kept = {"a": "test"}, {"train/a": "test"}
    with pytest.raises(PipelineError, match="class 'a' is for test in the dataset that is there, and would be for t"):
        planned(by_folders)
    with pytest.raises(PipelineError, match=r"s.json: class 'train/a' is for test in the dataset"):
        planned(by_file)
    by_folders.kept = {"train/a": "train", "val/b": "train"}  # of a dataset whose classes have the folders' names
    assert planned(by_folders)[0].splits["train"] == ["train/a", "val/b"]
    lost = Folder(str(tree(tmp_path / "flat", "a", "b", "c")))
    lost.kept = {"a": "train", "b": "train", "c": "train", "gone": "val"}
    with pytest.raises(PipelineError, match="split 'val' would have no class: those that it has in the dataset are g"):
        planned(lost)


def config(root: Path, images: Path, **source: Any) -> dict[str, Any]:
    settings = {"kind": "folder", "path": str(images), "shape": [3, 8, 8], "grows": True, **source}
    return {"data": {"name": "mine", "root": str(root), "source": settings}}


def split_of(manifest: Manifest) -> dict[str, str]:
    return {manifest.class_names[n]: split for split, members in manifest.splits.items() for n in members}


def test_a_dataset_that_grows_remembers_its_splits(ray_session: Any, tmp_path: Path) -> None:
    images = tree(tmp_path / "in", *(f"class {number:02}" for number in range(20)))
    half = {"train": 0.5, "val": 0.25, "test": 0.25}
    first = ingest(config(tmp_path, images, fractions=half), progress=False)
    tree(images, *(f"more {number:02}" for number in range(10)))
    second = ingest({**config(tmp_path, images), "overwrite": True}, progress=False)
    before, after = split_of(first), split_of(second)
    assert len(after) == 30 and {name: after[name] for name in before} == before
    assert split_of(ingest(config(tmp_path / "afresh", images), progress=False)) != after


def test_small_classes_are_left_out_and_listed(ray_session: Any, tmp_path: Path) -> None:
    """By the files that are there, and again by the images that can be used, without broken ones and duplicates."""
    images = tree(tmp_path / "in", "a", "b", "c", "d", images=6)
    tree(images, "few", images=3)
    tree(images, "broken", "twins", images=5)
    (images / "broken" / "0.png").write_bytes(b"no image")
    shutil.copy(images / "twins" / "0.png", images / "twins" / "1.png")
    fractions = {"train": 0.5, "test": 0.5}
    manifest = ingest(
        {**config(tmp_path, images, min_images=5, fractions=fractions), "max_skipped_fraction": 0.1}, progress=False
    )
    assert manifest.class_names == ["a", "b", "c", "d"] and manifest.class_counts == [6] * 4
    assert manifest.skipped == {"duplicate_in_class": 1, "small_class": 3, "unreadable": 1}
    listed = json.loads((tmp_path / "mine" / SKIPPED_NAME).read_text())["files"]
    reasons = {entry["class"]: entry["detail"] for entry in listed if entry["reason"] == "small_class"}
    assert reasons["few"] == "has 3 usable images, fewer than data.source.min_images=5"
    assert "has 4 usable" in reasons["broken"] and "has 4 usable" in reasons["twins"]
    for folder in ("few", "broken", "twins"):
        shutil.rmtree(images / folder)
    clean = ingest(config(tmp_path / "clean", images, fractions=fractions), progress=False)
    assert clean.class_names == manifest.class_names and clean.mean != [0.0] * 3
    assert read_manifest(str(tmp_path / "mine")) == manifest


def test_no_image_is_left_out_for_one_of_a_class_that_is_left_out() -> None:
    """Of a, which has three of the images of c, and of b: c has enough where theirs do not come first."""
    content = {"a": "rst", "b": "ux", "c": "rstuv", "d": "vwxyz"}
    digests = [letter.encode() for letters in content.values() for letter in letters]
    numbers = np.repeat(np.arange(4), [len(letters) for letters in content.values()])
    rows = Rows(numbers, [str(row) for row in range(len(digests))], digests, np.zeros((15, 1)), np.zeros((15, 1)), [])
    source = Folder("nowhere", min_images=4)
    stays, duplicates, small = _chosen(Plan(list(content), {}, [], {}), rows, source)
    assert "".join(np.array(list("".join(content.values())))[stays]) == "rstuv" + "wxyz"
    assert [skip.class_name for skip in small] == ["a", "b"] and len(duplicates) == 6
    source.keep_duplicates = True
    assert _chosen(Plan(list(content), {}, [], {}), rows, source)[0].tolist() == [False] * 5 + [True] * 10


def test_a_split_is_not_named_twice(tmp_path: Path) -> None:
    classes = [(name, np.zeros((1, 1, 4, 4), np.uint8)) for name in "ab"]
    manifest = write_dataset(str(tmp_path / "set"), "set", classes, {"train": ["a"], "val": ["b"]})
    assert len(class_table(manifest, "train+val")) == 2
    with pytest.raises(PipelineError, match=r"split 'train\+train' names 'train' twice"):
        class_table(manifest, "train+train")
    with pytest.raises(PipelineError, match=r"rotations=\[0, 360\] have the same turn twice"):
        Folder(str(tmp_path), rotations=[0, 360])


def test_splits_of_an_editor_that_marks_the_beginning_are_read(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"train": ["a"]}), "utf-8-sig")
    assert from_file(str(tmp_path / "s.json")) == {"train": ["a"]}


def test_a_message_names_the_classes_that_are_too_small(tmp_path: Path) -> None:
    sizes = {"ant": 2, "bee": 9, "cow": 3, "dog": 1, "emu": 4}
    classes = [(name, np.zeros((size, 1, 4, 4), np.uint8)) for name, size in sizes.items()]
    manifest = write_dataset(str(tmp_path / "set"), "set", classes, {"train": list(sizes)}, rotations=(0, 90))
    with pytest.raises(PipelineError) as refusal:
        check_spec(class_table(manifest, "train"), EpisodeSpec(2, 1, 4), "train")
    assert str(refusal.value) == (
        "train.shot + train.query = 1 + 4: the smallest class of split 'train' has only 1 images ('ant', 'cow', 'dog' "
        "and 1 more); smaller classes are left out by data.source.min_images=5 at jobs.ingest"
    )


def test_folders_of_splits_beside_others_are_said_to_be_none(tmp_path: Path) -> None:
    root = tree(tmp_path, "train/cat", "train/cow", "test/dog", "unlabelled/all", "flat")
    plan, said = planned(Folder(str(root), shape=[3, 8, 8]))
    assert "test/dog" in plan.classes
    assert "the folders test, train stand beside 'flat', and are taken as a part of" in said[0]
    _, said = planned(Folder(str(tree(tmp_path / "one", "train/steam", "bus/red", "car/blue")), shape=[3, 8, 8]))
    assert not said, "one such folder is a class of vehicles"
