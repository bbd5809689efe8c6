"""CIFAR-100 for few-shot learning: CIFAR-FS (Bertinetto et al. 2019) and FC100 (Oreshkin et al. 2018).

All 600 images of a class, in the order of their file names: first its 500 of CIFAR-100's training part, then its 100
of the test part, so that the last sixth of a class's rows are CIFAR-100's test images.

Read from class folders (``train/CLASS/*.png``, ``test/CLASS/*.png``; a folder or a zip archive) or from the official
``cifar-100-python.tar.gz``, whose pickles are read without executing them. Both give the same rows.
"""

import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.data.sources import splits
from pipeline.data.sources.arrays import chunks
from pipeline.data.sources.base import Chunk, Plan, Report
from pipeline.data.sources.files import FileSource, Rule
from pipeline.data.sources.tree import folder_of, grouped, list_tree
from pipeline.data.sources.unpickle import read_arrays
from pipeline.errors import PipelineError, check_choice

PARTS = ("train", "test")
MEMBER_BYTES = 256 * 2**20
ARCHIVE_NAMES = ("cifar-100-python.tar.gz", "cifar100-png.zip")


class Cifar100(FileSource):
    """``path``: an archive, or the folder that holds one or the unpacked classes. ``split``: cifar_fs or fc100."""

    rule = Rule(shape=(3, 32, 32), modes=frozenset({"RGB"}), size=(32, 32))

    def __init__(self, path: str | None, split: str) -> None:
        check_choice("data.source.split", split, ("cifar_fs", "fc100"))
        super().__init__(
            path,
            "cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, or train/CLASS/*.png and "
            "test/CLASS/*.png in a folder or a zip archive",
        )
        inside = (os.path.join(self.path, name) for name in ARCHIVE_NAMES)
        self.path, self.split = next(filter(os.path.isfile, inside), self.path), split

    def plan(self, chunk_rows: int, report: Report) -> Plan:
        chosen = splits.published(self.split)
        about = {"kind": "cifar100", "split": self.split}
        if is_tar(self.path):
            classes = sorted(name for names in chosen.values() for name in names)
            source = {**about, "path": self.given}
            return Plan(classes, chosen, [classes], source, images=60_000, archives=self.archives)
        listed, skipped = list_tree(self.path)
        found, others = grouped(listed, _class_of, "no_class", "does not lie in train/CLASS or test/CLASS")
        entries = {name: sorted(files, key=lambda file: PARTS.index(_part(file.name))) for name, files in found.items()}
        splits.require(chosen, set(entries), self.given)
        return self.plan_files(entries, chosen, chunk_rows, skipped + others, **about)

    def read(self, order: Any, chunk_rows: int) -> Iterator[Chunk]:
        """An order is a list of files or, of the official archive, all classes."""
        if not is_tar(self.path):
            return super().read(order, chunk_rows)
        return chunks(*read_python_archive(self.path, order), chunk_rows)


def read_python_archive(path: str, classes: list[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The official archive: images uint8 [60000, 3, 32, 32], positions in ``classes`` [60000], names as of the PNGs.

    Names begin with the part, so that within a class the training part sorts before the test part.
    """
    content = _untar(path)
    fine = read_arrays(io.BytesIO(content["meta"]), f"{path}: meta")["fine_label_names"]
    if sorted(fine) != classes:
        raise PipelineError(f"{path} has other class names than CIFAR-100; fetch it again")
    position = np.asarray([classes.index(name) for name in fine])
    images, labels, names = [], [], []
    for number, part in enumerate(PARTS):
        batch = read_arrays(io.BytesIO(content.pop(part)), f"{path}: {part}")
        try:
            data, fine_labels = np.asarray(batch["data"]), np.asarray(batch["fine_labels"], dtype=np.int64)
            files = [str(name) for name in batch["filenames"]]
            images.append(data.reshape(len(fine_labels), 3, 32, 32))
            labels.append(position[fine_labels])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise PipelineError(f"{path}: {part} is no batch of CIFAR-100 ({error}); fetch it again") from error
        if data.dtype != np.uint8 or len(files) != len(data):
            raise PipelineError(f"{path}: {part} is no batch of CIFAR-100; fetch it again")
        names += [f"{number}-{part}/{name}" for name in files]
    return np.concatenate(images), np.concatenate(labels), names


def _untar(path: str) -> dict[str, bytes]:
    wanted = {f"cifar-100-python/{name}": name for name in ("meta", *PARTS)}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                if member.name in wanted and member.isfile():
                    if member.size > MEMBER_BYTES:
                        raise PipelineError(f"{path} is refused: {member.name} of {member.size:,} bytes is a bomb")
                    stream = archive.extractfile(member)
                    assert stream is not None
                    found[wanted[member.name]] = stream.read()
            while archive.fileobj is not None and archive.fileobj.read(2**20):
                continue  # to the end of the file, where its checksum is
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise PipelineError(f"{path} is not a readable tar archive ({error}); fetch it again") from error
    missing = [name for name in wanted if wanted[name] not in found]
    if missing:
        raise PipelineError(f"{path} lacks {missing[0]}; is it cifar-100-python.tar.gz?")
    return found


def is_tar(path: str) -> bool:
    return path.endswith((".tar.gz", ".tgz", ".tar"))


def _class_of(name: str) -> str | None:
    return name.split("/")[-2] if _part(name) in PARTS else None


def _part(name: str) -> str:
    """The folder above that of the class."""
    return folder_of(folder_of(name)).rpartition("/")[2]
