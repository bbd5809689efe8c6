"""A pretrained network on real photographs: SimpleShot against scikit-learn's nearest centroid on the same features."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.dataset import ClassTable
from pipeline.data.episodes import EpisodeSpec, plan_episodes
from pipeline.data.sources.base import Plan
from pipeline.data.sources.by_kind import make_source
from pipeline.evaluation.statistics import estimate
from pipeline.methods.simple_shot import SimpleShot
from pipeline.nets.pieces import in_pieces
from pipeline.nets.preprocess import Preprocess
from pipeline.weights import recipe, with_weights

pytest.importorskip("timm")
neighbors = pytest.importorskip("sklearn.neighbors")

SHAPE = (3, 224, 224)
POOLS = {  # classes and images of each: of training, whose mean SimpleShot subtracts, and of the test
    "orl": ((20, 5), (12, 10)),
    "gtsrb": ((20, 5), (12, 10)),
    "caltech101": ((45, 10), (40, 12)),
}


SETS = ["orl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gtsrb", "caltech101"))]


@pytest.fixture(scope="module", params=SETS)
def features(request: pytest.FixtureRequest, real_data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of EfficientNet-Lite0: [N, D] of training classes, and [classes, images, D] of test classes."""
    folder = Path(os.environ.get("PIPELINE_PHOTOGRAPHS", "")) / request.param
    weights = real_data / "pretrained" / "tf_efficientnet_lite0.safetensors"
    if "PIPELINE_PHOTOGRAPHS" not in os.environ or not folder.is_dir() or not weights.is_file():
        pytest.skip(f"set PIPELINE_PHOTOGRAPHS to a folder with {request.param}/; {weights} is needed too")
    source = make_source({"kind": request.param, "path": str(folder), "shape": list(SHAPE)})
    plan = source.plan(1000, print)
    options = {"name": "timm", "model": "tf_efficientnet_lite0", "weights": str(weights)}
    network, preprocess = with_weights(options, SHAPE), Preprocess("backbone", **recipe(options, 3))

    def embedded(split: str, classes: int, images: int) -> torch.Tensor:
        with torch.no_grad():
            parts = [
                in_pieces(network, preprocess(torch.from_numpy(chunk.images)))
                for chunk in source.read(chosen(plan, split, classes, images), 100)
            ]
        return torch.cat(parts).unflatten(0, (classes, images))

    training, test = POOLS[request.param]
    return embedded("train", *training).flatten(0, 1), embedded("test", *test)


def chosen(plan: Plan, split: str, classes: int, images: int) -> list:
    """The first files of the first classes of a split."""
    rows = [row for order in plan.orders for row in order]
    of = {name: [row for row in rows if row[1] == name] for name in plan.splits[split]}
    return [row for name in [name for name in of if len(of[name]) >= images][:classes] for row in of[name][:images]]


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning", "ignore:.*within_class_std_dev_.*")  # sklearn's, with one shot
@pytest.mark.parametrize("shot", [1, 5])
def test_simple_shot_is_at_least_as_good_as_the_nearest_centroid(features: tuple, shot: int) -> None:
    base, novel = features
    backbone = torch.nn.Identity()
    backbone.out_features = base.shape[1]
    method = SimpleShot(backbone, classes=20).eval()
    method.keep_summary(base.double().sum(0), len(base))
    classes, each = novel.shape[:2]
    table = ClassTable(np.arange(classes), np.arange(classes) * each, np.full(classes, each), "test")
    plan = plan_episodes(table, EpisodeSpec(5, shot, 5), 0, np.arange(600))
    images, s = novel.flatten(0, 1)[plan.rows], plan.support
    labels = torch.from_numpy(plan.labels)
    with torch.no_grad():
        logits = method.scores(method.fit(images[:, :s], labels[:, :s], 5), images[:, s:])
    ours = (logits.argmax(-1) == labels[:, s:]).double().mean(1).numpy()
    theirs = np.asarray(
        [
            neighbors.NearestCentroid().fit(one[:s], right[:s]).score(one[s:], right[s:])
            for one, right in zip(images.numpy(), plan.labels, strict=True)
        ]
    )
    assert theirs.mean() > 0.4, "the features tell the classes apart"
    a, b = estimate(ours), estimate(theirs)
    assert a.mean + a.interval >= b.mean - b.interval, f"{a} is worse than {b}"
