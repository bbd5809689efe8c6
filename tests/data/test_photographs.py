"""Published sets of photographs in their layouts: which files are taken, of which class, in which split."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.dataset import ClassTable
from pipeline.data.episodes import EpisodeSpec, plan_episodes
from pipeline.data.sources.base import Chunk, Plan
from pipeline.data.sources.by_kind import make_source
from pipeline.data.sources.splits import published
from pipeline.errors import PipelineError

SETS = {"caltech101": (45, 16, 40), "gtsrb": (22, 7, 14), "orl": (20, 8, 12)}
VIEWS = [("Faces", "Faces_easy"), ("cougar_body", "cougar_face"), ("crocodile", "crocodile_head")]
VIEWS += [("flamingo", "flamingo_head")]


def names_of(kind: str) -> list[str]:
    return sorted(name for names in published(kind).values() for name in names)


def save(path: Path, number: int, mode: str = "RGB") -> None:
    """A small image like no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def read(kind: str, path: Path, **settings: object) -> tuple[Plan, list[Chunk]]:
    source = make_source({"kind": kind, "path": str(path), "shape": [3, 8, 8], **settings})
    plan = source.plan(50, print)
    return plan, [chunk for order in plan.orders for chunk in source.read(order, 50)]


def pixels(chunks: list[Chunk]) -> np.ndarray:
    return np.concatenate([chunk.images for chunk in chunks])


@pytest.mark.parametrize(("kind", "sizes"), SETS.items())
def test_splits_are_whole_and_disjoint(kind: str, sizes: tuple[int, int, int]) -> None:
    chosen = published(kind)
    assert tuple(len(chosen[split]) for split in ("train", "val", "test")) == sizes
    assert len(set(names_of(kind))) == sum(map(len, chosen.values()))


def test_two_views_of_one_thing_are_in_one_split_and_the_background_is_no_category() -> None:
    chosen = published("caltech101")
    owner = {name: split for split, names in chosen.items() for name in names}
    assert all(owner[one] == owner[other] for one, other in VIEWS)
    assert chosen["strangers"] == ["BACKGROUND_Google"]


def test_caltech_in_a_folder_and_in_a_zip_archive_is_the_same(tmp_path: Path) -> None:
    top = tmp_path / "set" / "101_ObjectCategories"
    for number, name in enumerate(names_of("caltech101")):
        for image in range(2):
            save(top / name / f"image_{image + 1:04d}.jpg", 2 * number + image, "L" if image else "RGB")
    (top / "BACKGROUND_Google" / "tmp").write_bytes(b"no image")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(top.rglob("*.*")):
            archive.write(path, path.relative_to(tmp_path / "set"))
    plan, chunks = read("caltech101", tmp_path / "set")
    assert plan.images == 204 and plan.classes == names_of("caltech101")
    assert [skip.file.rpartition("/")[2] for skip in plan.skipped] == ["tmp"]
    np.testing.assert_array_equal(pixels(read("caltech101", tmp_path / "set.zip")[1]), pixels(chunks))


def frames(folder: Path, tracks: int, kaggle: bool) -> None:
    """Signs of ``tracks`` tracks of 5 frames; the grey of a frame is its track."""
    for name in names_of("gtsrb"):
        for track in range(tracks):
            for frame in range(5):
                file = f"{name}_{track:05d}_{frame:05d}.png" if kaggle else f"{track:05d}_{frame:05d}.ppm"
                place = folder / ("Train" if kaggle else "Final_Training/Images") / (str(int(name)) if kaggle else name)
                place.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (6 + frame, 8), (track, int(name), 10 * frame)).save(place / file)


@pytest.mark.parametrize("kaggle", [False, True])
def test_a_track_gives_its_middle_frame_alone(tmp_path: Path, kaggle: bool) -> None:
    frames(tmp_path, tracks=4, kaggle=kaggle)
    save(tmp_path / "Final_Test" / "Images" / "00000.ppm", 1)
    save(tmp_path / "Meta" / "0.png", 2)
    plan, chunks = read("gtsrb", tmp_path)
    found = pixels(chunks)[:, :, 0, 0]
    assert plan.classes == [f"{number:05d}" for number in range(43)]
    np.testing.assert_array_equal(found[:, 0], np.tile(np.arange(4), 43))  # one of each track
    np.testing.assert_array_equal(found[:, 1], np.repeat(np.arange(43), 4))
    assert set(found[:, 2]) == {20}  # the middle one of five
    reasons = [skip.reason for skip in plan.skipped]
    assert (reasons.count("near_copy"), reasons.count("not_in_split")) == (4 * 4 * 43, 2)


def test_no_episode_has_two_frames_of_a_track(tmp_path: Path) -> None:
    frames(tmp_path, tracks=4, kaggle=False)
    plan, chunks = read("gtsrb", tmp_path)
    tracks = [name.rpartition("_")[0] for chunk in chunks for name in chunk.names]  # of every row: its sign and track
    starts = np.arange(0, 4 * 43, 4)
    table = ClassTable(np.arange(43), starts, np.full(43, 4), "test")
    episodes = plan_episodes(table, EpisodeSpec(5, 2, 2), 0, np.arange(50))
    for rows in episodes.rows:
        assert len({tracks[row] for row in rows}) == len(rows)


def test_the_same_frames_in_two_layouts_are_refused(tmp_path: Path) -> None:
    frames(tmp_path / "one", tracks=1, kaggle=False)
    frames(tmp_path / "two", tracks=1, kaggle=True)
    with pytest.raises(PipelineError, match="holds GTSRB twice, as in"):
        read("gtsrb", tmp_path)


def test_faces_are_grey_photographs_of_people(tmp_path: Path) -> None:
    for person in range(1, 41):
        for image in range(1, 4):
            save(tmp_path / "att_faces" / f"s{person}" / f"{image}.pgm", 10 * person + image, "L")
    (tmp_path / "att_faces" / "README").write_text("about")
    plan, chunks = read("orl", tmp_path, encoding="encoded")
    assert plan.images == 120 and len(plan.classes) == 40
    assert (pixels(chunks)[:, 0] == pixels(chunks)[:, 2]).all()
    assert all(file.startswith(b"\x89PNG") for chunk in chunks for file in chunk.files or [])  # without loss
    _, grey = read("orl", tmp_path, shape=[1, 8, 8])
    np.testing.assert_array_equal(pixels(grey)[:, 0], pixels(chunks)[:, 0])


def test_what_is_no_such_set_is_refused_in_a_line(tmp_path: Path) -> None:
    save(tmp_path / "s1" / "1.pgm", 0, "L")
    with pytest.raises(PipelineError, match="lacks 39 classes of the split"):
        read("orl", tmp_path)
    with pytest.raises(PipelineError, match="does not hold GTSRB's training images"):
        read("gtsrb", tmp_path)
    with pytest.raises(PipelineError, match="is packed: unpack it, and give its folder"):
        read("caltech101", tmp_path / "101_ObjectCategories.tar.gz")
    with pytest.raises(PipelineError, match=r"data.source.shape=\[2, 8, 8\]"):
        read("orl", tmp_path, shape=[2, 8, 8])


def test_small_classes_are_left_out_where_asked(tmp_path: Path) -> None:
    for person in range(1, 41):
        for image in range(2 if person == 40 else 3):
            save(tmp_path / f"s{person}" / f"{image}.pgm", 10 * person + image, "L")
    plan, _ = read("orl", tmp_path, min_images=3)
    assert "s40" not in plan.classes and not any("s40" in names for names in plan.splits.values())
    assert [skip.reason for skip in plan.skipped] == ["small_class"]


@pytest.fixture(params=SETS)
def photographs(request: pytest.FixtureRequest) -> Iterator[tuple[str, Path]]:
    folder = Path(os.environ.get("PIPELINE_PHOTOGRAPHS", "")) / request.param
    if "PIPELINE_PHOTOGRAPHS" not in os.environ or not folder.is_dir():
        pytest.skip("set PIPELINE_PHOTOGRAPHS to a folder with caltech101/, gtsrb/ and orl/")
    yield request.param, folder


def test_the_real_sets_are_whole(photographs: tuple[str, Path]) -> None:
    kind, folder = photographs
    plan = make_source({"kind": kind, "path": str(folder)}).plan(1000, print)
    counted = {"caltech101": (9144, 9145), "gtsrb": (1307,), "orl": (400,)}[kind]
    assert plan.images in counted
    if kind == "gtsrb":
        assert sum(skip.reason == "near_copy" for skip in plan.skipped) == 39209 - 1307
