"""Small runs of every method that has a configuration: a new method's YAML is enough to be tested with the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import compose

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {  # what a small run needs beside the defaults of its method
    "relation": ["backbone=relation_encoder"],
    "clustering": ["train.grouping=[2,2]", "train.batch_size=24"],
    "meta_networks": ["method.filters=8", "method.hidden=8"],
    "reptile": ["backbone=conv4_strided", "method.inner_steps_eval=10", "method.query_statistics=support"],
    "maml_plus_plus": ["method.inner_steps=2", "method.inner_steps_eval=2"],
    "meta_lstm": ["method.inner_steps=3", "method.inner_steps_eval=3"],
    "tadam": ["train.batch_size=24"],
    "rfs": ["train.batch_size=24"],
    "pmf": ["method.steps=2", "method.rate_episodes=2"],
    "maml": ["backbone=conv4_strided", "backbone.width=16", "method.inner_steps=2", "method.inner_lr=0.1"],
    "imprinted": ["train.batch_size=24", "train.holdout=0.2", "augmentation.crop_padding=2", "augmentation.flip=true",
                  "augmentation.jitter=0.2"],
}  # fmt: skip
METHODS = {
    path.stem: [f"method={path.stem}", *OPTIONS.get(path.stem, [])]
    for path in sorted((ROOT / "pipeline" / "conf" / "method").glob("*.yaml"))
}

SMALL = [
    "steps=12", "log_every=3", "seed=3",
    "train.way=5", "train.shot=1", "train.query=3", "train.meta_batch_size=4",
    "validation.every=6", "validation.episodes=10", "validation.query=5", "checkpoint.every=4",
    "evaluation=null", "register_as=null", "tracking=none", "backbone.width=8",
]  # fmt: skip


@pytest.fixture
def small_run(glyphs, tmp_path):
    """A function from overrides to the composed configuration of a small run on glyphs."""

    def make(method: str, *overrides: str) -> dict:
        root, name = glyphs.rsplit("/", 1)
        usual = [*SMALL, *METHODS[method]]
        if any(override.startswith("backbone=") for override in overrides):  # with its own options
            usual = [override for override in usual if not override.startswith("backbone")]
        place = [f"data.root={root}", f"data.name={name}", f"storage={tmp_path}/runs"]
        return compose("train", [*usual, *place, *overrides])

    return make
