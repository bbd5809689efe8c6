"""Folders as people and systems leave them: what is listed, under which name, and what is said of the rest."""

from __future__ import annotations

import os
import socket
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.sources.by_kind import make_source
from pipeline.data.sources.folder import Folder
from pipeline.data.sources.splits import from_file
from pipeline.data.sources.tree import absolute, list_tree
from pipeline.errors import PipelineError
from pipeline.inference.folders import read_queries, read_support
from tests.data.test_sources import read_all

NFC, NFD = "caf\u00e9", "cafe\u0301"


def save(path: Path | bytes, seed: int = 0) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    with open(path, "wb") as stream:
        Image.fromarray(pixels).save(stream, "PNG")


def album(root: Path, classes: tuple[str, ...] = ("a", "b", "c")) -> Path:
    for number, name in enumerate(classes):
        save(root / name / "1.png", number)
    return root


def listed(root: Path) -> tuple[list[str], set[tuple[str, str]]]:
    entries, skipped = list_tree(str(root))
    return [entry.name for entry in entries], {(skip.file, skip.reason) for skip in skipped}


SYSTEM = [
    "a/Thumbs.db", "a/thumbs.db", "b/Desktop.ini", "c/.DS_Store", "@eaDir/x/1.png", "a/@eaDir/1.png", "Icon\r",
    "$RECYCLE.BIN/S-1/desktop.ini", "lost+found/1.png", "__MACOSX/a/._1.png", ".git/objects/1.png",
    "System Volume Information/x.png",
]  # fmt: skip


def test_what_systems_leave_is_no_class_and_no_damage(tmp_path: Path) -> None:
    """The same in a folder, in a zip archive, and where labelled images and queries are read for classification."""
    album(tmp_path / "in")
    for name in SYSTEM:
        save(tmp_path / "in" / name, 9)
    names, skipped = listed(tmp_path / "in")
    assert names == ["a/1.png", "b/1.png", "c/1.png"] and {reason for _, reason in skipped} == {"hidden"}
    assert {file for file, _ in skipped} == {
        "a/Thumbs.db", "a/thumbs.db", "b/Desktop.ini", "c/.DS_Store", "@eaDir/", "a/@eaDir/", "Icon\r",
        "$RECYCLE.BIN/", "lost+found/", "__MACOSX/", ".git/", "System Volume Information/",
    }  # fmt: skip
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for path in sorted((tmp_path / "in").rglob("*")):
            if path.is_file() and path.name != "Icon\r":
                archive.write(path, path.relative_to(tmp_path / "in"))
    assert listed(tmp_path / "in.zip") == (names, skipped - {("Icon\r", "hidden")})
    (tmp_path / "in" / "empty").mkdir()
    pictures, labels = read_support(tmp_path / "in", (3, 8, 8))
    assert labels == ["a", "b", "c"] and not pictures.skipped
    assert len(read_queries(tmp_path / "in", (3, 8, 8)).files) == 3
    assert Folder(str(tmp_path / "in")).plan(10, print).classes == ["a", "b", "c"]


def test_pipes_sockets_and_devices_are_counted_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    album(tmp_path)
    os.mkfifo(tmp_path / "a" / "pipe.png")
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("b/socket.png")
    (tmp_path / "c" / "zero.png").symlink_to("/dev/zero")
    names, skipped = listed(tmp_path)
    assert names == ["a/1.png", "b/1.png", "c/1.png"]
    assert skipped == {(name, "no_file") for name in ("a/pipe.png", "b/socket.png", "c/zero.png")}
    _, chunk = read_all(Folder(str(tmp_path)))
    assert {skip.detail for skip in chunk.skipped} == {"is a FIFO", "is a socket", "is a device"}
    pictures, labels = read_support(tmp_path, (3, 8, 8))
    assert labels == ["a", "b", "c"] and len(pictures.skipped) == 3
    assert len(read_queries(tmp_path, (3, 8, 8)).skipped) == 3
    with pytest.raises(PipelineError, match="neither a file nor a folder"):
        read_queries(tmp_path / "a" / "pipe.png", (3, 8, 8))
    with pytest.raises(PipelineError, match="it is no file"):
        from_file(str(tmp_path / "a" / "pipe.png"))


def test_paths_that_are_too_long_are_counted(tmp_path: Path) -> None:
    album(tmp_path / "in")
    place = os.open(tmp_path / "in" / "a", os.O_RDONLY)
    for _ in range(20):  # of 250 letters each: 4,096 bytes are the limit
        os.mkdir("x" * 250, dir_fd=place)
        place, above = os.open("x" * 250, os.O_RDONLY, dir_fd=place), place
        os.close(above)
    os.close(place)
    entries, skipped = list_tree(str(tmp_path / "in"))
    assert [entry.name for entry in entries] == ["a/1.png", "b/1.png", "c/1.png"]
    [skip] = skipped
    assert skip.reason == "unreadable_folder" and skip.detail == "File name too long"


def test_folders_that_may_not_be_read_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    album(tmp_path)
    scandir = os.scandir

    def forbidding(path: str) -> object:
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    assert listed(tmp_path) == (["a/1.png", "c/1.png"], {("b/", "unreadable_folder")})
    assert ("Permission denied") in {why for _, why in read_queries(tmp_path, (3, 8, 8)).skipped}
    with pytest.raises(PipelineError, match=r"data.source.path=.*/b cannot be read: Permission denied"):
        list_tree(str(tmp_path / "b"))


def test_names_in_no_encoding_are_shown_and_read(tmp_path: Path) -> None:
    root = os.fsencode(album(tmp_path))
    save(root + b"/a/caf\xe9.png", 5)
    save(root + b"/\xfcber/1.png", 6)
    plan, chunk = read_all(Folder(str(tmp_path), grows=True))
    assert plan.classes == ["a", "b", "c", "\ufffdber"]
    assert chunk.names == ["a/1.png", "a/caf\ufffd.png", "b/1.png", "c/1.png", "\ufffdber/1.png"]
    assert not chunk.skipped and "".join(chunk.names).encode()
    _, labels = read_support(tmp_path, (3, 8, 8))
    assert labels == ["a", "a", "b", "c", "\ufffdber"]
    save(root + b"/\xe4ber/1.png", 7)
    with pytest.raises(PipelineError, match="two folders are named '\ufffdber'"):
        Folder(str(tmp_path)).plan(10, print)


def test_links_have_the_folders_own_name_or_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order in which the file system lists them; what leads there again is listed."""
    save(tmp_path / "elsewhere" / "1.png", 3)
    root = album(tmp_path / "in", ("own", "b"))
    for name, target in {"alias": "own", "z": "../elsewhere", "m": "../elsewhere", "up": ".."}.items():
        (root / name).symlink_to(target)
    (root / "b" / "round").symlink_to("..")
    scandir = os.scandir
    expected = (
        ["b/1.png", "m/1.png", "own/1.png"],
        {("alias/", "linked_again"), ("z/", "linked_again"), ("b/round/", "linked_again")},
    )
    for reverse in (False, True):
        monkeypatch.setattr(
            os, "scandir", lambda path, r=reverse: sorted(scandir(path), key=lambda e: e.name)[:: -1 if r else 1]
        )  # noqa: E501
        names, skipped = listed(root)
        assert names == expected[0] and expected[1] <= skipped, reverse


def test_one_unicode_form_inside(tmp_path: Path) -> None:
    """A macOS folder and a Linux folder make the same dataset; split files and enrolments find their classes."""
    plans = []
    for number, form in enumerate((NFC, NFD)):
        root = tmp_path / str(number)
        for seed, name in enumerate((form, "b", "c")):
            save(root / name / f"{form}.png", seed)
        split = tmp_path / f"{number}.json"
        split.write_text(f'{{"train": ["{NFD}"], "val": ["b"], "test": ["c"]}}')
        assert Folder(str(root), splits=str(split)).plan(10, print).splits["train"] == [NFC]
        plan, chunk = read_all(Folder(str(root), grows=True))
        plans.append((plan.classes, plan.splits, chunk.names, [len(order) for order in plan.orders]))
        assert read_support(root, (3, 8, 8))[1][-1] == NFC
    assert plans[0] == plans[1] and unicodedata.is_normalized("NFC", "".join(plans[0][2]))
    save(tmp_path / "0" / NFD / "2.png", 9)
    for read in (lambda root: Folder(str(root)).plan(10, print), lambda root: read_support(root, (3, 8, 8))):
        with pytest.raises(PipelineError, match="different Unicode forms"):
            read(tmp_path / "0")
    (tmp_path / "twice.json").write_text(f'{{"train": ["{NFD}"], "test": ["{NFC}"]}}')
    with pytest.raises(PipelineError, match=f"class '{NFC}' is in 'train' and in 'test'"):
        from_file(str(tmp_path / "twice.json"))


def test_addresses_are_no_local_paths(tmp_path: Path) -> None:
    for kind in ("folder", "mini_imagenet"):
        with pytest.raises(PipelineError, match=r"s3://bucket/photos: .* not from s3: copy or mount them first"):
            make_source({"kind": kind, "path": "s3://bucket/photos"})
    assert absolute("file:///a/b") == "/a/b" and absolute("~/x") == str(Path.home() / "x")
