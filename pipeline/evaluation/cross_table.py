"""Extractors crossed with classifiers: every trained backbone under every way to learn new classes, on the same
episodes (Goldblum et al. 2020, table 1).

Frozen features of an image are computed once for all classifiers that only look at features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch

from pipeline.batch import Episodes
from pipeline.data.batches import to_batch
from pipeline.data.dataset import class_table, open_dataset, read_manifest
from pipeline.data.episodes import check_spec, plan_episodes
from pipeline.errors import PipelineError
from pipeline.evaluation.embedded import Embeddings, given_embeddings, possible
from pipeline.evaluation.episodic import episode_accuracies
from pipeline.evaluation.evaluate import PART, EpisodicProtocol
from pipeline.evaluation.extractor import matched
from pipeline.evaluation.model import Model, build_on_worker
from pipeline.evaluation.spread import cores, embed_table, parts
from pipeline.evaluation.statistics import Comparison, Estimate, estimate, paired
from pipeline.methods.base import Method, embed
from pipeline.methods.baseline import Baseline
from pipeline.model import build_model, network_shape

IMAGES = 2000  # embedded at once
FROZEN: dict[str, dict[str, Any]] = {  # columns of the table that look at features alone
    "svm": {"head": "svm"},
    "ridge": {"head": "ridge"},
    "prototypes": {"head": "prototype", "distance": "squared_euclidean"},
    "nearest": {"head": "nearest"},
    "linear": {"head": "linear"},
    "cosine": {"head": "cosine"},
}
TUNED = "maml"  # the column where all weights are tuned
COLUMNS = (*FROZEN, TUNED)


@dataclass(frozen=True)
class FineTune:
    """The column "maml": gradient descent on all weights from the extractor's, under a new linear layer."""

    steps: int = 20
    lr: float = 0.01
    norm: str = "running"  # batch-norm meanwhile: by the "running" averages of training, or the "batch"


@dataclass(frozen=True)
class CrossTable:
    """Accuracies of every episode for every extractor and classifier."""

    protocol: EpisodicProtocol
    models: list[Model]
    columns: list[str]
    accuracies: dict[tuple[str, str], np.ndarray] = field(repr=False)  # by label of the model and column, [episodes]

    def cell(self, label: str, column: str) -> Estimate:
        return estimate(self.accuracies[label, column])

    def comparisons(self) -> list[tuple[Model, Model, str, Comparison]]:
        """(meta, classical, column, meta minus classical) for every pair that shares its backbone."""
        of = self.accuracies
        return [
            (meta, classical, column, paired(of[classical.label, column], of[meta.label, column]))
            for meta, classical in matched(self.models)
            for column in self.columns
        ]


def cross_table(
    models: Sequence[Model], protocol: EpisodicProtocol, columns: Sequence[str], fine_tune: FineTune, gpus: float = 0.0
) -> CrossTable:
    """Measure all cells, spread over the cluster."""
    if unknown := [column for column in columns if column not in COLUMNS]:
        raise PipelineError(f"heads has {unknown[0]!r}: choose among {', '.join(COLUMNS)}")
    if len({model.label for model in models}) < len(models):
        raise PipelineError("every run can be in the table once")
    check_spec(class_table(read_manifest(protocol.dataset), protocol.split), protocol.spec, "cross_table")
    cells: dict[tuple[str, str], list[np.ndarray]] = {}
    for model in models:
        for answered, reference in _ask(model, protocol, columns, fine_tune, gpus):
            for column, values in zip(answered, ray.get(reference), strict=True):
                cells.setdefault((model.label, column), []).append(values)
    return CrossTable(protocol, list(models), list(columns), {key: np.concatenate(v) for key, v in cells.items()})


def classifier(method: Method, column: str, fine_tune: FineTune) -> Baseline:
    """The column's way to learn new classes, around the backbone of a trained method."""
    how = FROZEN.get(column)
    if how is None:
        how = {"head": "finetune_all", "epochs": fine_tune.steps, "lr": fine_tune.lr, "norm": fine_tune.norm}
    example = next(method.backbone.parameters(), torch.empty(0))
    return Baseline(method.extractor(), classes=1, **how).to(example.device).eval()


def _ask(
    model: Model, protocol: EpisodicProtocol, columns: Sequence[str], fine_tune: FineTune, gpus: float
) -> list[tuple[list[str], Any]]:
    """Ray tasks, each of some columns for some episodes, in the order of the episodes."""
    held, options = ray.put(model), {"num_cpus": 1, "num_gpus": gpus}
    numbers = parts(protocol.episodes, min(PART, -(-protocol.episodes // cores())))
    frozen = [column for column in columns if column != TUNED]
    tasks: list[tuple[list[str], Any]] = []
    if frozen:
        vectors, look = _embed(held, model, protocol, options), _frozen.options(**options)
        tasks += [(frozen, look.remote(held, protocol, frozen, part, gpus > 0, vectors)) for part in numbers]
    if TUNED in columns:
        tune = _tuned.options(**options)
        tasks += [([TUNED], tune.remote(held, protocol, fine_tune, part, gpus > 0)) for part in numbers]
    return tasks


def _embed(held: Any, model: Model, protocol: EpisodicProtocol, options: dict[str, Any]) -> Any:
    """A reference to the embeddings of the whole split; None where embedding the episodes costs less."""
    table = class_table(read_manifest(protocol.dataset), protocol.split)
    method = build_model(model.spec)
    images = protocol.episodes * protocol.way * (protocol.shot + protocol.query)
    if not possible(classifier(method, "prototypes", FineTune()), table, images):
        return None
    return embed_table(held, network_shape(model.spec), protocol.dataset, table, options["num_gpus"])


@ray.remote
def _frozen(
    model: Model,
    protocol: EpisodicProtocol,
    columns: list[str],
    numbers: np.ndarray,
    gpu: bool,
    vectors: np.ndarray | None,
) -> list[np.ndarray]:
    return frozen_accuracies(model, protocol, columns, numbers, gpu, vectors)


def frozen_accuracies(
    model: Model,
    protocol: EpisodicProtocol,
    columns: list[str],
    numbers: np.ndarray,
    gpu: bool = False,
    vectors: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Of every column, the accuracy in each of the episodes ``numbers`` [n].

    Where no ``vectors`` of the split are given, support and queries of the episodes are embedded, apart from each
    other; a backbone that normalises by its batch gets one episode at a time.
    """
    method, preprocess, device = build_on_worker(model, gpu)
    dataset = open_dataset(protocol.dataset)
    table = class_table(dataset.manifest, protocol.split)
    embeddings = None if vectors is None else Embeddings(vectors, table)
    heads = [classifier(method, column, FineTune()) for column in columns]
    size = protocol.way * (protocol.shot + protocol.query)
    alone = not possible(heads[0], table, 10**18)  # also for embeddings that are too large to keep
    found: list[list[np.ndarray]] = [[] for _ in columns]
    for chunk in parts(len(numbers), 1 if alone else max(1, min(protocol.tasks, IMAGES // size))):
        plan = plan_episodes(table, protocol.spec, protocol.seed, numbers[chunk])
        s = plan.support
        if embeddings is not None:
            features = embeddings.of(plan).to(device)
        else:
            pixels = torch.from_numpy(dataset.gather(plan.rows)).to(device)
            batch = to_batch(plan, pixels, dataset.manifest.rotations)
            assert isinstance(batch, Episodes)
            extractor = heads[0].backbone
            with torch.no_grad():
                sides = [embed(extractor, preprocess(images)).float() for images in (batch.support, batch.query)]
            features = torch.cat(sides, dim=1)[..., None, None]
        labels = torch.from_numpy(np.array(plan.labels)).to(device)
        for head, right in zip(heads, found, strict=True):
            with torch.no_grad(), given_embeddings(head):
                logits = head.classify(head.adapt(features[:, :s], labels[:, :s], plan.way), features[:, s:])
            right.append((logits.argmax(-1) == labels[:, s:]).double().mean(1).cpu().numpy())
    return [np.concatenate(right) for right in found]


@ray.remote
def _tuned(model: Model, protocol: EpisodicProtocol, how: FineTune, numbers: np.ndarray, gpu: bool) -> list[np.ndarray]:
    return [tuned_accuracies(model, protocol, how, numbers, gpu)]


def tuned_accuracies(
    model: Model, protocol: EpisodicProtocol, how: FineTune, numbers: np.ndarray, gpu: bool = False
) -> np.ndarray:
    """The accuracy of the column "maml" in each of the episodes ``numbers`` [n]."""
    method, preprocess, device = build_on_worker(model, gpu)
    dataset = open_dataset(protocol.dataset)
    table = class_table(dataset.manifest, protocol.split)
    tuned = classifier(method, TUNED, how)
    return episode_accuracies(
        tuned, preprocess, dataset, table, protocol.spec, protocol.seed, numbers, protocol.tasks, device
    )
