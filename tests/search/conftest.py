"""Small campaigns on glyphs."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import compose
from pipeline.search.arguments import translate
from pipeline.search.campaign import Campaign

BASE = [
    "steps=12", "log_every=3", "train.way=5", "train.shot=1", "train.query=3", "train.meta_batch_size=4",
    "validation.every=6",
    "checkpoint.every=6", "backbone.width=8", "cluster.workers=1",
]  # fmt: skip
OBJECTIVE = [
    "objective.way=5", "objective.shot=1", "objective.query=5", "objective.episodes=10", "objective.split=val",
]  # fmt: skip


@pytest.fixture
def arguments(glyphs, tmp_path):
    """A function from more arguments to those of a small campaign."""
    root, name = glyphs.rsplit("/", 1)

    def make(*more: str, campaign: str = "metric_scale") -> list[str]:
        base = [f"base.{argument}" for argument in [*BASE, f"data.root={root}", "data=glyphs", f"data.name={name}"]]
        place = [f"storage={tmp_path}/runs", "tracking=none", "name=small"]
        return [f"campaign={campaign}", *base, *OBJECTIVE, *place, *more]

    return make


@pytest.fixture
def campaign(arguments):
    """A function from more arguments, and keys that are replaced whole, to a small campaign."""

    def make(*more: str, campaign: str = "metric_scale", **replaced: Any) -> Campaign:
        raw = compose("tune", translate(arguments(*more, campaign=campaign)))
        return Campaign({**raw, **replaced})

    return make
