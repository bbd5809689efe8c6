"""Every cell of the table against the classifier on its own, on the same episodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.data.dataset import Dataset, class_table
from pipeline.errors import PipelineError
from pipeline.evaluation.cross_table import (
    COLUMNS,
    FineTune,
    classifier,
    cross_table,
    frozen_accuracies,
    tuned_accuracies,
)
from pipeline.evaluation.embedded import embed_part
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
            built.backbone(preprocess(torch.from_numpy(part)))
        return Model(spec(method), dict(built.state_dict()), f"{method}{seed}")

    return make


@pytest.fixture
def protocol(glyphs) -> EpisodicProtocol:
    return EpisodicProtocol(glyphs, "test", 5, 2, 4, episodes=12, seed=9, tasks=5)


@pytest.fixture
def vectors(glyphs, model) -> np.ndarray:
    dataset = Dataset(glyphs)
    table = class_table(dataset.manifest, "test")
    method, preprocess, device = build_on_worker(model())
    return embed_part(method.backbone, preprocess, dataset, table, range(int(table.counts.sum())), device)


@pytest.mark.parametrize("embedded", [False, True])
def test_prototypes_are_prototypical_networks(glyphs, protocol, model, vectors, embedded):
    dataset = Dataset(glyphs)
    table = class_table(dataset.manifest, "test")
    method, preprocess, _ = build_on_worker(model())
    numbers = np.arange(2, 6)
    expected = episode_accuracies(method, preprocess, dataset, table, protocol.spec, protocol.seed, numbers, 5)
    found = frozen_accuracies(model(), protocol, FROZEN, numbers, vectors=vectors if embedded else None)
    np.testing.assert_allclose(found[FROZEN.index("prototypes")], expected, atol=1e-12)
    for column, values in zip(FROZEN, found, strict=True):
        head = classifier(build_on_worker(model())[0], column, FineTune())
        alone = episode_accuracies(head, preprocess, dataset, table, protocol.spec, protocol.seed, numbers, 1)
        assert values.shape == (4,) and np.abs(values - alone).max() <= 0.1, column  # a query at a border may turn


def test_a_backbone_that_normalises_by_its_batch_sees_one_episode(protocol, model):
    numbers = np.arange(6)
    together = frozen_accuracies(model("maml"), protocol, ["prototypes"], numbers)[0]
    one_by_one = [frozen_accuracies(model("maml"), protocol, ["prototypes"], numbers[n : n + 1])[0] for n in range(6)]
    np.testing.assert_array_equal(together, np.concatenate(one_by_one))


@pytest.mark.parametrize("method", ["prototypical", "maml"])
def test_fine_tuning_starts_from_the_extractor(protocol, model, method):
    """Without a step the new layer is what it starts as; with steps it fits the support."""
    numbers = np.arange(6)
    tuned = tuned_accuracies(model(method), protocol, FineTune(steps=20, lr=0.1), numbers)
    barely = tuned_accuracies(model(method), protocol, FineTune(steps=1, lr=1e-9), numbers)
    assert tuned.mean() > barely.mean() + 0.15 and abs(barely.mean() - 0.2) < 0.15
    again = tuned_accuracies(model(method), protocol, FineTune(steps=20, lr=0.1), numbers[4:])
    np.testing.assert_array_equal(tuned[4:], again)


def test_the_table(ray_session, protocol, model):
    models = [model("prototypical"), model("baseline", seed=6)]
    fine_tune = FineTune(steps=2)
    table = cross_table(models, protocol, list(COLUMNS), fine_tune)
    for m in models:
        frozen = frozen_accuracies(m, protocol, FROZEN, np.arange(12))
        for column, values in zip(FROZEN, frozen, strict=True):
            assert np.abs(table.accuracies[m.label, column] - values).max() <= 0.1
        tuned = tuned_accuracies(m, protocol, fine_tune, np.arange(12))
        np.testing.assert_array_equal(table.accuracies[m.label, "maml"], tuned)
        assert table.cell(m.label, "maml").mean == pytest.approx(tuned.mean())
    compared = table.comparisons()
    assert [(a.label, b.label, column) for a, b, column, _ in compared] == [
        ("prototypical5", "baseline6", column) for column in COLUMNS
    ]
    for _, _, column, comparison in compared:
        a, b = (table.accuracies[m.label, column] for m in models)
        assert comparison.difference == pytest.approx((a - b).mean())


@pytest.mark.parametrize(
    ("columns", "labels", "message"),
    [(["svm", "tree"], 1, "heads has 'tree': choose among svm"), (["svm"], 2, "every run can be in the table once")],
)
def test_refusals(protocol, model, columns, labels, message):
    with pytest.raises(PipelineError, match=message):
        cross_table([model()] * labels, protocol, columns, FineTune())
