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
    monkeypatch.setattr("pipeline.evaluation.spread.embed_table", _counted(calls))
    found = calibrate_run(*subject.build(), dataset, TRAINED, once)
    alone = calibrate_run(*subject.build(), dataset, TRAINED)
    assert len(found.points) == len(alone.points) > 5
    for a, b in zip(found.points, alone.points, strict=True):
        assert (a.way, a.shot, a.score, a.stranger_queries) == (b.way, b.shot, b.score, b.stranger_queries)
        assert a.threshold == pytest.approx(b.threshold, rel=1e-3, abs=1e-4)
        assert a.accuracy == pytest.approx(b.accuracy, abs=0.005)
    assert len(calls) == (2 if norm == "batch" else 0)  # the background alone: the split was embedded by evaluation


def _counted(calls: list):
    from pipeline.evaluation.spread import embed_table

    def counted(*given):
        calls.append(given)
        return embed_table(*given)

    return counted
