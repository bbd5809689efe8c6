"""ORL, the AT&T database of faces: ten grey photographs each of 40 people, 92 x 112 (Samaria and Harter 1994)."""

from __future__ import annotations

from pipeline.data.sources.photographs import Photographs


class Orl(Photographs):
    """``path``: a folder or zip archive with the folders ``s1`` to ``s40`` of ``1.pgm`` to ``10.pgm``, at any depth.

    PNG and JPEG files in the same folders are taken as well. Split: 20 / 8 / 12 people.
    """

    kind = "orl"
    layout = "a folder or zip archive with a folder s1 ... s40 for each person's images"
    suffixes = (".pgm", ".png", ".jpg", ".jpeg")
