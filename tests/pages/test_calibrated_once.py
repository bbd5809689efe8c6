"""Calibration on the cluster finds what it finds in one process; each image is embedded once where it can be."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.dataset import Dataset
from pipeline.evaluation.evaluate import EpisodicProtocol, evaluate
from pipeline.evaluation.model import Model
from pipeline.evaluation.spread import EmbeddedSplits
from pipeline.model import build_model
from pipeline.pages import strangers
from pipeline.pages.card import MOST_IMAGES, draw_card
from pipeline.pages.pictures import draw_pictures
from pipeline.pages.strangers import calibrate_run

TRAINED = {"validation": {"split": "val", "seed": 3}, "train": {"split": "train"}}


def model(norm: str, uri: str) -> Model:
    spec = {
        "method": {"name": "prototypical"}, "backbone": {"name": "conv4", "width": 8, "norm": norm}, "way": 5,
        "classes": 60, "input": {"shape": [1, 28, 28], "scaling": "unit"},
    }  # fmt: skip
    torch.manual_seed(2)
    return Model(spec, dict(build_model(spec).state_dict()), "run", uri)


@pytest.mark.parametrize("norm", ["batch", "batch_statistics"])
def test_the_cluster_calibrates_alike(ray_session, glyphs, norm, monkeypatch):
    """Batch-norm by the batch: what a query is depends on the others, so that every question needs its images."""
    subject, dataset = model(norm, glyphs), Dataset(glyphs)
    once = EmbeddedSplits(subject)
    evaluate(subject, [EpisodicProtocol(glyphs, "val", 5, 1, 5, episodes=40)], once=once)
    calls = []
    embed = strangers.EmbeddedSplits.few
    monkeypatch.setattr(strangers.EmbeddedSplits, "few", lambda *given: calls.append(given) or embed(*given))
    monkeypatch.setattr(EmbeddedSplits, "embed", _counted(calls))
    found = calibrate_run(*subject.build(), dataset, TRAINED, once)
    alone = calibrate_run(*subject.build(), dataset, TRAINED)
    assert len(found.points) == len(alone.points) > 5
    for a, b in zip(found.points, alone.points, strict=True):
        assert (a.way, a.shot, a.score, a.stranger_queries) == (b.way, b.shot, b.score, b.stranger_queries)
        assert a.threshold == pytest.approx(b.threshold, rel=1e-3, abs=1e-4)
        assert a.accuracy == pytest.approx(b.accuracy, abs=0.005)
    assert len(calls) == (2 if norm == "batch" else 0)  # the background alone: the split was embedded by evaluation


def test_calibration_and_card_embed_at_most_twice_what_an_evaluation_does(ray_session, glyphs, monkeypatch):
    """Of 2,800 images. What they cost at 224 x 224 is what these go through the network for."""
    subject, dataset = model("batch", glyphs), Dataset(glyphs)
    tables, here, build = [], [], Model.build

    def built(self):
        method, preprocess = build(self)
        method.backbone.register_forward_hook(lambda module, given, out: here.append(len(given[0])))
        return method, preprocess

    monkeypatch.setattr(Model, "build", built)
    monkeypatch.setattr(EmbeddedSplits, "embed", _counted(tables))
    once, protocol = EmbeddedSplits(subject), EpisodicProtocol(glyphs, "test", 5, 1, 5, episodes=400)
    [result] = evaluate(subject, [protocol], once=once)
    first, images = len(tables), [int(given[2].counts.sum()) for given in tables]
    calibration = calibrate_run(*subject.build(), dataset, TRAINED, once)
    embeddings = once.of(glyphs, "test", MOST_IMAGES)
    assert calibration is not None and embeddings is not None
    origin = {"run": "run", "step": 0, "untrained": [], "arguments": []}
    draw_card(*subject.build(), dataset, protocol, result.accuracies, origin, 1.0, embeddings)
    draw_pictures(*subject.build(), dataset, "test", [{"model": "run", **result.summary()}], embeddings)
    more = [int(given[2].counts.sum()) for given in tables[first:]]
    assert sum(here) == 0, "none goes through the network of the driver"
    assert 0 < sum(more) <= 2 * sum(images), (more, images)


def _counted(calls: list):
    embed = EmbeddedSplits.embed

    def counted(*given):
        calls.append(given)
        return embed(*given)

    return counted
