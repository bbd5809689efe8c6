"""Every cell of the table against the classifier on its own, on the same episodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.data.dataset import Dataset, class_table
from pipeline.errors import PipelineError
from pipeline.evaluation.cross_table import COLUMNS, FineTune, cross_table, under
from pipeline.evaluation.episodic import episode_accuracies
from pipeline.evaluation.evaluate import EpisodicProtocol
from pipeline.evaluation.model import Model, build_on_worker
from pipeline.model import build_model, build_preprocess

from .test_episodic import spec

FROZEN = ["svm", "ridge", "prototypes", "nearest", "linear", "cosine"]


@pytest.fixture(scope="module")
def model(glyphs):
    """A function to an extractor of random weights, whose running averages are those of the images."""

    def make(method: str = "prototypical", seed: int = 5) -> Model:
        torch.manual_seed(seed)
        built, preprocess = build_model(spec(method)), build_preprocess(spec(method))
        for part in Dataset(glyphs).gather(np.arange(400)).reshape(10, 40, 1, 28, 28):
            built.extractor()(preprocess(torch.from_numpy(part)))
        return Model(spec(method), dict(built.state_dict()), f"{method}{seed}")

    return make


@pytest.fixture
def protocol(glyphs) -> EpisodicProtocol:
    return EpisodicProtocol(glyphs, "test", 5, 2, 4, episodes=12, seed=9, tasks=5)


def accuracies(model: Model, column: str, protocol, numbers, how: FineTune | None = None, chunk: int = 5) -> np.ndarray:
    """Of a cell, in this process."""
    method, preprocess, _ = build_on_worker(under(model, column, how or FineTune()))
    dataset = Dataset(protocol.dataset)
    table = class_table(dataset.manifest, protocol.split)
    return episode_accuracies(method, preprocess, dataset, table, protocol.spec, protocol.seed, numbers, chunk)


def test_prototypes_are_prototypical_networks(glyphs, protocol, model):
    dataset, numbers = Dataset(glyphs), np.arange(2, 6)
    method, preprocess, _ = build_on_worker(model())
    table = class_table(dataset.manifest, "test")
    expected = episode_accuracies(method, preprocess, dataset, table, protocol.spec, protocol.seed, numbers, 5)
    np.testing.assert_allclose(accuracies(model(), "prototypes", protocol, numbers), expected, atol=1e-12)


@pytest.mark.parametrize("name", ["maml", "maml_plus_plus"])
def test_the_extractor_is_what_learns(model, name):
    """A method that has layers of its own inside the backbone leaves it as the first of its inner steps finds it."""
    images = torch.rand(3, 1, 28, 28)
    method, column = build_on_worker(model(name))[0], build_on_worker(under(model(name), "svm", FineTune()))[0]
    assert torch.equal(method.extractor().eval()(images), column.backbone(images))


@pytest.mark.parametrize("method", ["prototypical", "maml"])
def test_fine_tuning_starts_from_the_extractor(protocol, model, method):
    """Without a step the new layer is what it starts as; with steps it fits the support."""
    numbers = np.arange(6)
    tuned = accuracies(model(method), "maml", protocol, numbers, FineTune(20, 0.1))
    barely = accuracies(model(method), "maml", protocol, numbers, FineTune(1, 1e-9))
    assert tuned.mean() > barely.mean() + 0.15 and abs(barely.mean() - 0.2) < 0.15
    again = accuracies(model(method), "maml", protocol, numbers[4:], FineTune(20, 0.1))
    np.testing.assert_array_equal(tuned[4:], again)


def test_the_table(ray_session, protocol, model):
    models = [model("prototypical"), model("baseline", seed=6), model("maml")]
    fine_tune = FineTune(steps=2)
    table = cross_table(models, protocol, list(COLUMNS), fine_tune)
    for m in models:
        for column in COLUMNS:
            chunk = 1 if m.label == "maml5" and column != "maml" else 5  # normalised by its batch: episode by episode
            alone = accuracies(m, column, protocol, np.arange(12), fine_tune, chunk)
            np.testing.assert_allclose(
                table.accuracies[m.label, column], alone, rtol=0, atol=0.1
            )  # a query at a border
        assert table.cell(m.label, "maml").mean == pytest.approx(table.accuracies[m.label, "maml"].mean())
    np.testing.assert_array_equal(
        table.accuracies["maml5", "prototypes"], accuracies(models[2], "prototypes", protocol, np.arange(12), chunk=1)
    )
    compared = table.comparisons()
    assert [(a.label, b.label, column) for a, b, column, _ in compared] == [
        (meta, "baseline6", column) for meta in ("prototypical5", "maml5") for column in COLUMNS
    ]
    for first, second, column, comparison in compared:
        a, b = (table.accuracies[m.label, column] for m in (first, second))
        assert comparison.difference == pytest.approx((a - b).mean())


@pytest.mark.parametrize(
    ("columns", "labels", "message"),
    [(["svm", "tree"], 1, "heads has 'tree': choose among svm"), (["svm"], 2, "every run can be in the table once")],
)
def test_refusals(protocol, model, columns, labels, message):
    with pytest.raises(PipelineError, match=message):
        cross_table([model()] * labels, protocol, columns, FineTune())
