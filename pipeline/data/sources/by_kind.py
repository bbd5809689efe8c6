"""From the kind of a configuration to the source of its images."""

import inspect
from collections.abc import Mapping
from typing import Any

from pipeline.data.sources.base import Source
from pipeline.data.sources.cifar import Cifar100
from pipeline.data.sources.folder import Folder
from pipeline.data.sources.glyphs import Glyphs
from pipeline.data.sources.gtsrb import Gtsrb
from pipeline.data.sources.mini_imagenet import MiniImagenet
from pipeline.data.sources.omniglot import Omniglot
from pipeline.data.sources.photographs import Caltech101, Orl
from pipeline.errors import PipelineError, check_choice
from pipeline.options import check_options

SOURCES: dict[str, type[Source]] = {
    "caltech101": Caltech101,
    "cifar100": Cifar100,
    "folder": Folder,
    "glyphs": Glyphs,
    "gtsrb": Gtsrb,
    "mini_imagenet": MiniImagenet,
    "omniglot": Omniglot,
    "orl": Orl,
}


def make_source(config: Mapping[str, Any]) -> Source:
    """The source of ``config``: its key ``kind`` names it, the others are its settings."""
    settings = dict(config)
    kind = settings.pop("kind", None)
    if kind == "features":
        raise PipelineError("data=features: features are made by python -m jobs.embed, of a dataset of images")
    check_choice("data.source.kind", kind, SOURCES)
    known = [name for name in inspect.signature(SOURCES[kind].__init__).parameters if name != "self"]
    for key in settings:
        if key not in known:
            raise PipelineError(f"unknown key 'data.source.{key}'; source {kind} has {', '.join(known)}")
    check_options("data.source", SOURCES[kind], settings)
    return SOURCES[kind](**settings)
