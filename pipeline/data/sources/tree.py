"""Image files in a folder or in a zip archive, found, named and grouped the same way."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pipeline.data.archives import Member, list_zip
from pipeline.errors import PipelineError


class Entry(NamedTuple):
    """One image file: its path inside its root, and where its bytes lie."""

    name: str  # with "/" between folders
    container: str  # the archive, or the file itself
    member: Member | None  # None: the container is the file


def list_tree(path: str) -> list[Entry]:
    """All files under a folder, or in a zip archive, in the order of their names."""
    if os.path.isfile(path):
        return [Entry(member.name, path, member) for member in list_zip(path)]
    if not os.path.isdir(path):
        raise PipelineError(f"data.source.path={path}: there is no such folder or zip archive")
    return sorted(_walk(path), key=lambda entry: entry.name)


def _walk(root: str) -> Iterable[Entry]:
    seen: set[tuple[int, int]] = set()  # links may lead in circles
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inside = os.path.relpath(folder, root)
        for file in files:
            full = os.path.join(folder, file)
            name = file if inside == "." else f"{inside}/{file}"
            yield Entry(name.replace(os.sep, "/"), full, None)


def is_hidden(name: str) -> bool:
    """Whether a file was put there by an operating system rather than by a user."""
    return name.startswith((".", "__MACOSX/")) or "/." in name or name.endswith(("Thumbs.db", "desktop.ini"))


def folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def common_folder(names: Iterable[str]) -> str:
    """The folders, with a "/" at the end, that all names but none of their classes share."""
    folders = sorted({folder_of(name) for name in names})
    if len(folders) < 2:
        return ""
    first, last = folders[0].split("/"), folders[-1].split("/")
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    while shared and any(len(folder.split("/")) <= shared for folder in folders):
        shared -= 1  # images lie directly in the shared folder: it is a class itself
    return "".join(f"{part}/" for part in first[:shared])


def clean_name(name: str) -> str:
    """A class name in one Unicode form, so that all operating systems give the same."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise PipelineError(f"class name {name!a} is not valid Unicode; rename the folder") from None
    if any(unicodedata.category(letter) == "Cc" for letter in name):
        raise PipelineError(f"class name {name!a} holds control characters; rename the folder")
    return unicodedata.normalize("NFC", name)


def refuse_collisions(names: Iterable[str]) -> None:
    """Refuse class names that differ only in case, Unicode form or blanks: they are one class on other systems."""
    seen: dict[str, str] = {}
    for name in names:
        key = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        if seen.setdefault(key, name) != name:
            raise PipelineError(f"class names {seen[key]!r} and {name!r} collide; rename one of the folders")


def absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
