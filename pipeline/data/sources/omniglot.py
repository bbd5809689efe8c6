"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake, Salakhutdinov, Tenenbaum 2015).

Ink is 255 on 0 (published: black on white). The 105 x 105 drawings are resized to ``shape`` bilinearly with
antialiasing, as grey images: without it, thin strokes break.

Splits:
  vinyals     1,028 / 172 / 423 characters; each is four classes, turned by 0, 90, 180 and 270 degrees
              (Vinyals et al. 2016, in the files published with prototypical networks)
  background  the 30 background alphabets for training, of which ``val_alphabets`` drawn by ``seed`` for validation;
              the 20 evaluation alphabets for testing (Lake et al. 2015)
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.data.download import download
from pipeline.data.sources import splits
from pipeline.data.sources.base import Plan, Report
from pipeline.data.sources.files import FileSource, Rule, cut
from pipeline.data.sources.tree import Classes, absolute, grouped, list_tree
from pipeline.errors import PipelineError, check_choice

PUBLISHED = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
ARCHIVES = {
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}
ROTATIONS = (0, 90, 180, 270)


class Omniglot(FileSource):
    """``path``: folder with the two archives; None: downloaded to ``cache`` and checked by their published MD5."""

    rule = Rule(shape=(1, 28, 28), modes=frozenset({"1", "L"}), size=(105, 105), invert=True)

    def __init__(
        self,
        path: str | None = None,
        split: str = "vinyals",
        shape: Sequence[int] = (1, 28, 28),
        cache: str | None = None,
        url: str = PUBLISHED,
        val_alphabets: int = 5,
        seed: int = 0,
    ) -> None:
        check_choice("data.source.split", split, ("vinyals", "background"))
        asked = Rule.asked(shape, "raw", min_images=1).shape
        if split == "vinyals" and asked[1] != asked[2]:
            raise PipelineError(f"data.source.shape={list(shape)}: drawings that are turned as classes are square")
        self.rule = replace(self.rule, shape=asked)
        if not 0 < val_alphabets < 30:
            raise PipelineError(f"data.source.val_alphabets={val_alphabets} is not between 1 and 29")
        self.folder, self.split, self.url = path, split, url.rstrip("/")
        self.cache = cache or os.path.join(os.path.expanduser("~"), ".cache", "few-shot-downloads")
        self.val_alphabets, self.seed = val_alphabets, seed

    def plan(self, chunk_rows: int, report: Report) -> Plan:
        archives = self._fetched(report)
        found = {name: _characters(str(archive)) for name, archive in archives.items()}
        characters = {name: entries for part in found.values() for name, entries in part.items()}
        if len(characters) != sum(map(len, found.values())):
            raise PipelineError("the background and evaluation archives of Omniglot share characters; fetch them again")
        background, evaluation = (sorted(found[name]) for name in ARCHIVES)
        rotations: tuple[int, ...]
        if self.split == "vinyals":
            chosen, rotations = splits.published("omniglot_vinyals"), ROTATIONS
            splits.require(chosen, set(characters), f"Omniglot in {os.path.dirname(archives['images_background.zip'])}")
        else:
            chosen, rotations = _by_alphabet(background, evaluation, self.val_alphabets, self.seed), (0,)
        classes = sorted(characters)
        orders = cut(characters, classes, chunk_rows)
        source = {"kind": "omniglot", "split": self.split, "path": self.folder or self.url}
        images = sum(map(len, characters.values()))
        return Plan(classes, chosen, orders, source, rotations, images, archives=[str(p) for p in archives.values()])

    def _fetched(self, report: Report) -> dict[str, Path]:
        if self.folder is None:
            return {
                name: download(f"{self.url}/{name}", Path(self.cache) / name, md5, report)
                for name, md5 in ARCHIVES.items()
            }
        paths = {name: Path(absolute(self.folder)) / name for name in ARCHIVES}
        for path in paths.values():
            if not path.is_file():
                raise PipelineError(f"data.source.path={self.folder} has no {path.name}; leave it out to download it")
        return paths


def _characters(archive: str) -> Classes:
    """Files by "alphabet/character", without the archive's own top folder."""

    def class_of(name: str) -> str | None:
        parts = name.split("/")
        return f"{parts[1]}/{parts[2]}" if len(parts) == 4 and name.endswith(".png") else None

    characters, _ = grouped(list_tree(archive)[0], class_of, "no_class", "")
    if not characters:
        raise PipelineError(f"{archive} holds no alphabet/character/drawing.png; is it an archive of Omniglot?")
    return characters


def _by_alphabet(background: list[str], evaluation: list[str], val_alphabets: int, seed: int) -> splits.Splits:
    alphabets = sorted({name.split("/")[0] for name in background})
    held = set(sorted(alphabets, key=lambda name: splits.draw(name, seed))[:val_alphabets])
    return {
        "train": [name for name in background if name.split("/")[0] not in held],
        "val": [name for name in background if name.split("/")[0] in held],
        "test": evaluation,
    }
