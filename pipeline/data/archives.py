"""Zip archives as sets of files that are read by offset; hostile ones are refused by name before anything is read.

A task maps the archive and reads its own members, so that many tasks read one archive without unpacking it.
"""

import mmap
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.errors import PipelineError

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
_UTF8 = 0x800  # flag of an entry: its name is UTF-8


# What no harmless path has: a backslash, control characters, a leading "/" or drive letter, a part "..".
_DOUBTFUL = re.compile(r"\\|[\0-\x09\x0b-\x1f]|^/|^[A-Za-z]:|(?:^|/)\.\.(?:/|$)", re.MULTILINE)


class Member(NamedTuple):
    """One file of an archive: where its bytes lie and what they must come to."""

    name: str
    offset: int  # of the local header
    packed: int  # bytes in the archive
    size: int  # bytes of the file
    crc: int
    method: int


@dataclass(frozen=True)
class Limits:
    """What an archive may unpack to. PNG and JPEG hardly shrink in a zip: a high ratio is an attack or a mistake."""

    members: int = 5_000_000
    member_bytes: int = 256 * 2**20
    total_bytes: int = 2**40
    ratio: int = 200  # for members and archives larger than ratio_from
    ratio_from: int = 2**20


LIMITS = Limits()


def list_zip(path: str, limits: Limits = LIMITS) -> list[Member]:
    """The files of a zip archive in name order; folders are left out.

    Refuses archives that are damaged, members that lead out of their folder, links, encrypted members and bombs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except FileNotFoundError as error:
        raise PipelineError(f"there is no archive {path}") from error
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise PipelineError(
            f"{path} is not a readable zip archive ({error}); fetch it again, or unpack one of another kind to a folder"
        ) from error
    if len(infos) > limits.members:
        raise PipelineError(f"{path} has {len(infos):,} entries, more than {limits.members:,}: refused as a bomb")
    doubtful = _DOUBTFUL.search("\n".join([info.orig_filename for info in infos])) is not None
    small = min(limits.ratio_from, limits.member_bytes)
    members = []
    for info in infos:
        name, packed, size = _name_of(info), info.compress_size, info.file_size
        if name.endswith("/"):
            continue
        if doubtful or size > small or info.external_attr >> 28 or info.flag_bits & 1 or info.compress_type:
            _check_member(path, info, limits)
        members.append(Member(name, info.header_offset, packed, size, info.CRC, info.compress_type))
    members.sort()
    _check_archive(path, members, limits)
    return members


def _name_of(info: zipfile.ZipInfo) -> str:
    return info.filename if info.flag_bits & _UTF8 else meant(info.filename)


def meant(name: str) -> str:
    """A name that was read as code page 437, in UTF-8 where its bytes are that: macOS and Info-ZIP do not say so, and
    the folder "café" would be another class than the same folder beside the archive."""
    try:
        return name if name.isascii() else name.encode("cp437").decode("utf-8")
    except UnicodeError:  # of an old program, which means the code page
        return name


def safe_name(name: str) -> bool:
    """Whether a path from an archive stays in its folder."""
    return bool(name) and _DOUBTFUL.search(name) is None


def _check_member(path: str, info: zipfile.ZipInfo, limits: Limits) -> None:
    def refuse(why: str) -> PipelineError:
        return PipelineError(f"{path} is refused: its entry {info.filename!r} {why}")

    if not safe_name(info.orig_filename):
        inside = safe_name(info.orig_filename.replace("\\", "/"))
        raise refuse("has a backslash in its name; pack it again" if inside else "leads out of its folder")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise refuse("is a link")
    if info.flag_bits & 0x1:
        raise refuse("is encrypted")
    if info.compress_type not in (_STORED, _DEFLATED):
        raise refuse(f"is packed by method {info.compress_type}; pack it again with deflate")
    if info.file_size > limits.member_bytes:
        raise refuse(f"unpacks to {info.file_size:,} bytes, more than {limits.member_bytes:,}: a decompression bomb")
    if info.file_size > limits.ratio_from and info.file_size > limits.ratio * max(info.compress_size, 1):
        raise refuse(f"unpacks to more than {limits.ratio} times its size: a decompression bomb")


def _check_archive(path: str, members: list[Member], limits: Limits) -> None:
    packed, size = sum(member.packed for member in members), sum(member.size for member in members)
    if size > limits.total_bytes or (size > limits.ratio_from and size > limits.ratio * max(packed, 1)):
        raise PipelineError(f"{path} is refused: it unpacks to {size:,} bytes from {packed:,}: a decompression bomb")
    end = 0
    for member in sorted(members, key=lambda member: member.offset):
        if member.offset < end:
            raise PipelineError(f"{path} is refused: its entry {member.name!r} overlaps another: a decompression bomb")
        end = member.offset + _LOCAL_HEADER.size + member.packed
    for before, after in zip(members, members[1:], strict=False):
        if before.name == after.name:
            raise PipelineError(f"{path} is refused: two entries are named {after.name!r}")


class BadMember(Exception):
    """A member whose bytes are not what the archive says."""


class ZipReader:
    """Reads members of a mapped archive."""

    def __init__(self, view: mmap.mmap) -> None:
        self._view = view

    def read(self, member: Member) -> bytes:
        """The bytes of a member; raises BadMember when they are cut short or altered."""
        header = self._view[member.offset : member.offset + _LOCAL_HEADER.size]
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise BadMember("has no header in the archive")
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        start = member.offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        content = self._view[start : start + member.packed]
        if member.method == _DEFLATED:
            try:
                content = zlib.decompressobj(-15).decompress(content, member.size + 1)
            except zlib.error as error:
                raise BadMember(f"does not unpack ({error})") from error
        if len(content) != member.size or zlib.crc32(content) != member.crc:
            raise BadMember("does not match its checksum in the archive")
        return content


@contextmanager
def open_zip(path: str) -> Iterator[ZipReader]:
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        yield ZipReader(view)
