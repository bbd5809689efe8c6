"""Image files in a folder or in a zip archive, found, named and grouped the same way."""

import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from pipeline.data.archives import Member, list_zip
from pipeline.data.sources.base import Skip
from pipeline.errors import PipelineError

_FOLDERS_OF_SYSTEMS = frozenset(
    ("__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "lost+found", "system volume information")
)
_FILES_OF_SYSTEMS = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"))
_NO_FILES = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class Entry(NamedTuple):
    """One image file: its path inside its root, and where its bytes lie."""

    name: str  # with "/" between folders, as :func:`shown` gives it
    container: str  # the archive, or the file itself
    member: Member | None  # None: the container is the file


Classes = dict[str, list[Entry]]  # the files of every class


def list_tree(path: str) -> tuple[list[Entry], list[Skip]]:
    """All files under a folder, or in a zip archive, in the order of their names; what is left out comes second."""
    return list_zip_tree(path) if os.path.isfile(path) else list_folder(path, "data.source.path")


def list_zip_tree(path: str) -> tuple[list[Entry], list[Skip]]:
    """The files of a zip archive, as :func:`list_tree` gives them."""
    hidden, entries = set(), []
    for member in list_zip(path):
        entry = Entry(unicodedata.normalize("NFC", member.name), path, member)
        part = hidden_part(entry.name)
        if part is None:
            entries.append(entry)
        else:
            hidden.add(part)
    return sorted(entries), [Skip(part, "", "hidden") for part in sorted(hidden)]


def list_folder(root: str, key: str) -> tuple[list[Entry], list[Skip]]:
    """The files below a folder, as :func:`list_tree` gives them; ``key`` named the folder.

    Links are followed. A folder that several names lead to is read once: by its own name where that lies below
    ``root``, else by the first of the links' names.
    """
    if not os.path.isdir(root):
        raise PipelineError(f"{key}={root}: there is no such folder{' or zip archive' if 'source' in key else ''}")
    entries: list[Entry] = []
    skipped: list[Skip] = []
    seen: dict[tuple[int, int], str] = {}  # links may lead in circles
    folders: list[tuple[str, str]] = [("", root)]
    links: list[tuple[str, str]] = []
    while folders or links:
        if not folders:
            links.sort(reverse=True)
            folders.append(links.pop())
        inside, folder = folders.pop()
        try:
            status = os.stat(folder)
            children = list(os.scandir(folder))
        except OSError as error:
            if not inside:
                raise PipelineError(f"{key}={root} cannot be read: {error.strerror}") from error
            skipped.append(Skip(f"{inside}/", "", "unreadable_folder", error.strerror or str(error)))
            continue
        before = seen.setdefault((status.st_dev, status.st_ino), inside)
        if before != inside:
            skipped.append(Skip(f"{inside}/", "", "linked_again", f"is the folder {before or '.'}"))
            continue
        for child in children:
            name = f"{inside}/{shown(child.name)}" if inside else shown(child.name)
            kind = _kind(child)
            hidden = hidden_part(f"{name}/" if kind == "folder" else name)
            if hidden is not None:
                skipped.append(Skip(hidden, "", "hidden"))
            elif kind == "folder":
                (links if child.is_symlink() else folders).append((name, child.path))
            elif kind == "file":
                entries.append(Entry(name, child.path, None))
            else:
                skipped.append(Skip(name, "", "no_file", f"is {kind}"))
    return sorted(entries), sorted(skipped)


def _kind(child: os.DirEntry[str]) -> str:
    """What a name stands for. What cannot be asked counts as a file: reading it will tell why not."""
    try:
        if child.is_dir():
            return "folder"
        if child.is_file():
            return "file"
        mode = child.stat().st_mode
    except OSError:
        return "file"
    return next((kind for test, kind in _NO_FILES if test(mode)), "file")


def shown(name: str) -> str:
    """A file's name as text: in one Unicode form, so that all systems give the same, whatever bytes it has."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "replace"))


def hidden_part(name: str) -> str | None:
    """The file, or the folder with a "/" at its end, that an operating system or a NAS put there, not a user."""
    *folders, file = name.split("/")
    for number, folder in enumerate(folders, start=1):
        if folder.startswith(".") or folder.casefold() in _FOLDERS_OF_SYSTEMS:
            return "/".join(folders[:number]) + "/"
    return name if file.startswith(".") or file.casefold() in _FILES_OF_SYSTEMS else None


def folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def common_folder(names: Iterable[str]) -> str:
    """The folders, with a "/" at the end, that all names but none of their classes share."""
    folders = [folder.split("/") for folder in {folder_of(name) for name in names}]
    if len(folders) < 2:
        return ""
    shared = os.path.commonprefix(folders)[: min(map(len, folders)) - 1]  # a folder with images in it is a class itself
    return "".join(f"{part}/" for part in shared)


def named_as_before(classes: Classes, kept: Iterable[str], shared: str) -> Classes:
    """``classes`` under the names that they have in ``kept``, where the folders that they share are no longer those.

    A folder that comes beside the only one, or goes, changes what all share, and with it every class's name.

    Args:
        shared: the folders, with a "/" at the end, that the names of ``classes`` were given without.
    """
    known, found = set(kept), Counter[tuple[str, str]]()  # by what is taken off, and put before
    found["", ""] = len(known & classes.keys())
    for name in classes:
        parts = name.split("/")
        found.update((f"{'/'.join(parts[:n])}/", "") for n in range(1, len(parts)) if "/".join(parts[n:]) in known)
        above = shared.split("/")[:-1]
        longer = ["".join(f"{part}/" for part in above[n:]) for n in range(len(above))]
        found.update(("", folders) for folders in longer if folders + name in known)
    [((less, more), _)] = found.most_common(1)  # of equals the first: as they are
    named: Classes = {}
    for name, entries in classes.items():
        before = more + name.removeprefix(less)
        if before in named:
            raise PipelineError(
                f"the folders {less + before} and {before} would both be class {before!r}, as the dataset that is "
                "there names the first: rename the second"
            )
        named[before] = entries
    return named


def grouped(
    entries: Iterable[Entry], class_of: Callable[[str], str | None], reason: str, detail: str
) -> tuple[Classes, list[Skip]]:
    """Entries by the class that ``class_of`` finds in their names; those of none are left out for the reason given."""
    classes: Classes = {}
    skipped = []
    for entry in entries:
        name = class_of(entry.name)
        if name is None:
            skipped.append(Skip(entry.name, "", reason, detail))
        else:
            classes.setdefault(name, []).append(entry)
    return classes, skipped


def by_class(entries: Iterable[Entry], part: slice) -> Classes:
    """Entries by class: the folders that ``part`` takes of every path.

    Refuses names that nobody could type, and classes that would be one on another system.
    """
    classes: Classes = {}
    places: dict[str, list[str]] = {}
    for entry in entries:
        folders = entry.name.split("/")
        name = "/".join(folders[part])
        place = (entry.member.name if entry.member else entry.container).split("/")[-len(folders) :][part]
        if places.setdefault(name, place) != place:
            raise PipelineError(
                f"two folders are named {name!r} in different Unicode forms or encodings; rename one of them"
            )
        if any(unicodedata.category(letter) == "Cc" for letter in name):
            raise PipelineError(f"class name {name!a} holds control characters; rename the folder")
        classes.setdefault(name, []).append(entry)
    _refuse_collisions(classes)
    return classes


def _refuse_collisions(names: Iterable[str]) -> None:
    """Refuse class names that differ only in case, Unicode form or blanks: they are one class on other systems."""
    seen: dict[str, str] = {}
    for name in names:
        before = seen.setdefault(folded(name), name)
        if before != name:
            raise PipelineError(f"class names {before!r} and {name!r} collide; rename one of the folders")


def folded(name: str) -> str:
    """What names have in common that differ only in case, Unicode form or blanks."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def absolute(path: str) -> str:
    """A local path from where the command was given; addresses of other places are refused."""
    if "://" in path and not path.startswith("file://"):
        scheme = path.partition("://")[0]
        raise PipelineError(f"{path}: images are read from this machine, not from {scheme}: copy or mount them first")
    return str(Path(path.removeprefix("file://")).expanduser().absolute())
