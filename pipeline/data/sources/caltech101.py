"""Caltech-101: 101 categories of 31 to 800 photographs of about 300 x 200 (Fei-Fei, Fergus and Perona 2004).

Split: 45 / 16 / 40 categories; the two views of one thing (``Faces`` and ``Faces_easy``, ``cougar_body`` and
``cougar_face``, ...) are in the same split. BACKGROUND_Google is no category but photographs of anything: a split of
its own, ``strangers``, which nothing is trained on.
"""

from __future__ import annotations

from pipeline.data.sources.photographs import Photographs


class Caltech101(Photographs):
    """``path``: the folder or a zip archive of ``101_ObjectCategories``, whose folders are the categories."""

    kind = "caltech101"
    layout = "101_ObjectCategories, with a folder for each category's images (tar -xzf 101_ObjectCategories.tar.gz)"
    suffixes = (".jpg", ".jpeg", ".png")
