"""Zip archives: read by offset as zipfile reads them; hostile ones are refused by name."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.archives import BadMember, Limits, list_zip, open_zip, safe_name
from pipeline.errors import PipelineError


def make_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_read_as_zipfile_reads_them(tmp_path: Path, method: int) -> None:
    random = np.random.default_rng(0)
    files = {f"{'b' if n % 2 else 'a'}/{n}.bin": random.bytes(50 * n) for n in range(40)} | {"a/é.txt": b"x" * 10_000}
    path = make_zip(tmp_path / "x.zip", files, method)
    with zipfile.ZipFile(path, "a") as archive:
        archive.mkdir("empty")
    members = list_zip(path)
    assert [member.name for member in members] == sorted(files)
    with open_zip(path) as reader:
        assert {member.name: reader.read(member) for member in members} == files


class _Unsaid(zipfile.ZipInfo):
    """An entry whose name has no word about its encoding."""

    encoding = "utf-8"

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802 (zipfile's)
        return self.filename.encode(self.encoding), 0


def test_names_in_utf8_are_read_as_such_where_the_archive_does_not_say_so(tmp_path: Path) -> None:
    """As macOS's archives and those of Info-ZIP: read as code page 437, "café" would be the class "cafe╠ü"."""
    names = {"cafe\u0301/1.png": "utf-8", "日本/1.png": "utf-8", "müsli/1.png": "cp437", "plain/1.png": "ascii"}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, encoding in names.items():
            entry = _Unsaid(name)
            entry.encoding = encoding
            archive.writestr(entry, name.encode())
    members = list_zip(str(tmp_path / "x.zip"))
    assert [member.name for member in members] == sorted(names)
    with open_zip(str(tmp_path / "x.zip")) as reader:
        assert [reader.read(member).decode() for member in members] == sorted(names)


def test_an_archive_behind_other_bytes_is_read(tmp_path: Path) -> None:
    """Self-extracting archives and some downloads have bytes in front."""
    path = Path(make_zip(tmp_path / "x.zip", {"a/1": b"content"}))
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    with open_zip(str(path)) as reader:
        assert reader.read(list_zip(str(path))[0]) == b"content"


@pytest.mark.parametrize(
    "name", ["../evil.png", "a/../../evil.png", "/etc/passwd", "C:/evil.png", "..", "a/..", "a\\..\\evil.png", "a/\x01"]
)
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    path = make_zip(tmp_path / "x.zip", {"fine/1.png": b"1", name: b"2"})
    with pytest.raises(PipelineError, match="leads out of its folder") as refusal:
        list_zip(path)
    assert repr(name) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_backslash_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="has a backslash in its name; pack it again"):
        list_zip(make_zip(tmp_path / "x.zip", {"cat\\1.png": b"1"}))


@pytest.mark.parametrize("name", ["a/b.png", "a..b/c..png", "...x/y", "a b/ü.png", "c:d"[1:]])
def test_harmless_names_are_taken(name: str) -> None:
    assert safe_name(name)


def test_links_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("a/link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(PipelineError, match="'a/link' is a link"):
        list_zip(str(tmp_path / "x.zip"))


def test_a_member_that_unpacks_to_much_more_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {"a/ok": b"1", "a/bomb": bytes(5 * 2**20)})
    with pytest.raises(PipelineError, match="'a/bomb' unpacks to more than 200 times its size: a decompression bomb"):
        list_zip(path)


def test_sizes_and_counts_are_limited(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {f"a/{n}": bytes(1000) for n in range(20)}, zipfile.ZIP_STORED)
    with pytest.raises(PipelineError, match="20 entries, more than 10"):
        list_zip(path, Limits(members=10))
    with pytest.raises(PipelineError, match="unpacks to 1,000 bytes, more than 999"):
        list_zip(path, Limits(member_bytes=999))
    with pytest.raises(PipelineError, match="unpacks to 20,000 bytes"):
        list_zip(path, Limits(total_bytes=19_999))
    assert len(list_zip(path, Limits(total_bytes=20_000, member_bytes=1000, members=20))) == 20


def test_many_small_members_that_unpack_to_much_are_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {f"a/{n}": bytes(2**20) for n in range(3)})
    with pytest.raises(PipelineError, match="3,145,728 bytes from .* a decompression bomb"):
        list_zip(path)


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    """Two entries of the directory that share their bytes, as in the bombs that need no recursion."""
    path = Path(make_zip(tmp_path / "x.zip", {"a/1": b"same" * 50, "b/2": b"same" * 50}, zipfile.ZIP_STORED))
    content = bytearray(path.read_bytes())
    second = content.rindex(b"PK\x01\x02")
    content[second + 42 : second + 46] = struct.pack("<I", 0)
    path.write_bytes(content)
    with pytest.raises(PipelineError, match="overlaps another: a decompression bomb"):
        list_zip(str(path))


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive, pytest.warns(UserWarning):
        archive.writestr("a/1", b"1")
        archive.writestr("a/1", b"2")
    with pytest.raises(PipelineError, match="two entries are named 'a/1'"):
        list_zip(str(tmp_path / "x.zip"))


def test_altered_members_are_told_from_good_ones(tmp_path: Path) -> None:
    path = Path(make_zip(tmp_path / "x.zip", {"a/1": b"A" * 500, "a/2": b"B" * 500}, zipfile.ZIP_STORED))
    content = bytearray(path.read_bytes())
    content[content.index(b"B" * 500)] ^= 1
    path.write_bytes(content)
    one, two = list_zip(str(path))
    with open_zip(str(path)) as reader:
        assert reader.read(one) == b"A" * 500
        with pytest.raises(BadMember, match="checksum"):
            reader.read(two)


def test_a_member_that_lies_about_its_size_unpacks_no_further(tmp_path: Path) -> None:
    path = Path(make_zip(tmp_path / "x.zip", {"a/1": bytes(900_000)}))
    member = list_zip(str(path))[0]
    with open_zip(str(path)) as reader, pytest.raises(BadMember):
        reader.read(member._replace(size=100))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x05\x06" + bytes(10)])
def test_broken_archives_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(PipelineError, match="not a readable zip archive"):
        list_zip(str(tmp_path / "x.zip"))


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a/1", bytes(1000))
    (tmp_path / "x.zip").write_bytes(sink.getvalue()[:-30])
    with pytest.raises(PipelineError, match="not a readable zip archive"):
        list_zip(str(tmp_path / "x.zip"))
