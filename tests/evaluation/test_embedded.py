"""Embedding every image once gives the accuracies that embedding each episode's images gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.data.dataset import Dataset, class_table
from pipeline.data.episodes import EpisodeSpec, plan_episodes
from pipeline.evaluation import spread as module
from pipeline.evaluation.embedded import Embeddings, embed_part, possible
from pipeline.evaluation.episodic import episode_accuracies
from pipeline.evaluation.evaluate import EpisodicProtocol, evaluate
from pipeline.evaluation.model import Model
from pipeline.model import build_model, build_preprocess

from .test_episodic import spec


@pytest.fixture(scope="module")
def parts(glyphs):
    torch.manual_seed(5)
    dataset = Dataset(glyphs)
    table = class_table(dataset.manifest, "test")
    method, preprocess = build_model(spec()).eval(), build_preprocess(spec())
    halves = range(70), range(70, int(table.counts.sum()))
    values = [embed_part(method.backbone, preprocess, dataset, table, half, torch.device("cpu")) for half in halves]
    return dataset, table, method, preprocess, Embeddings(np.concatenate(values), table)


def test_every_image_of_an_episode_finds_its_embedding(parts):
    dataset, table, method, preprocess, embeddings = parts
    plan = plan_episodes(table, EpisodeSpec(6, 2, 3), 3, np.arange(5))
    found = embeddings.of(plan)
    with torch.no_grad():
        expected = method.backbone(preprocess(torch.from_numpy(dataset.gather(plan.rows))))
    assert found.shape == (5, 30, method.backbone.out_features, 1, 1)
    torch.testing.assert_close(found.flatten(2), expected.unflatten(0, (5, 30)), rtol=1e-5, atol=1e-6)


def test_rotated_classes_are_turned(parts, monkeypatch):
    dataset, _, method, preprocess, _ = parts
    monkeypatch.setattr(dataset, "manifest", replace(dataset.manifest, rotations=[0, 90, 180, 270]))
    table = class_table(dataset.manifest, "val")
    every = range(int(table.counts.sum()))
    values = embed_part(method.backbone, preprocess, dataset, table, every, torch.device("cpu"))
    spec_ = EpisodeSpec(5, 1, 4)
    found = [
        episode_accuracies(method, preprocess, dataset, table, spec_, 1, np.arange(12), 4, embeddings=embeddings)
        for embeddings in (None, Embeddings(values, table))
    ]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("method", ["prototypical", "imprinted"])
def test_the_cluster_embeds_once(ray_session, glyphs, method, monkeypatch):
    protocols = [EpisodicProtocol(glyphs, "test", way, 2, 5, episodes=40, seed=3) for way in (5, 10)]
    torch.manual_seed(5)
    model = Model(spec(method), dict(build_model(spec(method)).state_dict()))
    once = evaluate(model, protocols)
    monkeypatch.setattr(module, "possible", lambda *_: False)
    for a, b in zip(once, evaluate(model, protocols), strict=True):
        np.testing.assert_array_equal(a.accuracies, b.accuracies)


def test_where_it_is_possible(parts):
    _, table, method, *_ = parts
    total = int(table.counts.sum())
    assert possible(method, table, total + 1) and not possible(method, table, total)
    batch = {**spec(), "backbone": {"name": "conv4", "width": 8, "norm": "batch_statistics"}}
    assert not possible(build_model(batch), table, total + 1)
    assert not possible(build_model(spec("maml")), table, total + 1)
