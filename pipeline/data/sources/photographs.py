"""Published sets of photographs, read from where the user has them, with splits of classes that come with the package.

Images are turned, cut and resized as those of a folder; duplicates are left out, because they leak into the queries.
"""

from collections.abc import Sequence

from pipeline.data.sources import splits
from pipeline.data.sources.base import Plan, Report, Skip
from pipeline.data.sources.files import FileSource, Rule
from pipeline.data.sources.tree import Classes, Entry, folder_of, grouped, list_tree
from pipeline.errors import PipelineError


class Photographs(FileSource):
    """``path``: a folder or a zip archive in the set's ``layout``."""

    kind: str
    layout: str  # for messages
    suffixes: tuple[str, ...]  # of its images' names
    keep_duplicates = False

    def __init__(
        self, path: str | None, shape: Sequence[int] = (3, 84, 84), encoding: str = "raw", min_images: int = 1
    ) -> None:
        super().__init__(path, self.layout)
        self.rule = Rule.asked(shape, encoding, min_images)
        self.encoding, self.min_images = encoding, min_images

    def plan(self, chunk_rows: int, report: Report) -> Plan:
        if self.path.endswith((".gz", ".tgz", ".tar", ".Z")):
            raise PipelineError(f"data.source.path={self.given} is packed: unpack it, and give its folder")
        listed, skipped = list_tree(self.path)
        chosen = splits.published(self.kind)
        entries, others = self.classes(listed, {name for names in chosen.values() for name in names})
        skipped += others
        if not entries:
            raise PipelineError(f"data.source.path={self.given} does not hold {self.layout}")
        splits.require(chosen, set(entries), self.given)
        entries = self.without_small(entries, skipped)
        chosen = {split: [name for name in names if name in entries] for split, names in chosen.items()}
        return self.plan_files(entries, chosen, chunk_rows, skipped, kind=self.kind)

    def classes(self, listed: Sequence[Entry], known: set[str]) -> tuple[Classes, list[Skip]]:
        """The files of every class, and what is left out: a class is the folder of that name that files lie in."""

        def class_of(name: str) -> str | None:
            folder = folder_of(name).rpartition("/")[2]
            return folder if folder in known and name.casefold().endswith(self.suffixes) else None

        return grouped(listed, class_of, "not_in_split", "is no image of a class")


class Caltech101(Photographs):
    """101 categories of 31 to 800 photographs of about 300 x 200 (Fei-Fei, Fergus and Perona 2004).

    ``path``: the folder or a zip archive of ``101_ObjectCategories``, whose folders are the categories. Split: 45 / 16
    / 40 categories; the two views of one thing (``Faces`` and ``Faces_easy``, ``cougar_body`` and ``cougar_face``, ...)
    are in the same split. BACKGROUND_Google is no category but photographs of anything: a split of its own,
    ``strangers``, which nothing is trained on.
    """

    kind = "caltech101"
    layout = "101_ObjectCategories, with a folder for each category's images (tar -xzf 101_ObjectCategories.tar.gz)"
    suffixes = (".jpg", ".jpeg", ".png")


class Orl(Photographs):
    """The AT&T database of faces: ten grey photographs each of 40 people, 92 x 112 (Samaria and Harter 1994).

    ``path``: a folder or zip archive with the folders ``s1`` to ``s40`` of ``1.pgm`` to ``10.pgm``, at any depth.

    PNG and JPEG files in the same folders are taken as well. Split: 20 / 8 / 12 people.
    """

    kind = "orl"
    layout = "a folder or zip archive with a folder s1 ... s40 for each person's images"
    suffixes = (".pgm", ".png", ".jpg", ".jpeg")
