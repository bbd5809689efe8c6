"""Extractors crossed with classifiers: every trained backbone under every way to learn new classes, on the same
episodes (Goldblum et al. 2020, table 1).

Frozen features of an image are computed once for all classifiers that only look at features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pipeline.errors import PipelineError
from pipeline.evaluation.evaluate import EpisodicProtocol, evaluate
from pipeline.evaluation.model import Model, matched
from pipeline.evaluation.spread import EmbeddedSplits
from pipeline.evaluation.statistics import Comparison, Estimate, estimate, paired
from pipeline.methods.base import Method
from pipeline.methods.baseline import Baseline
from pipeline.nets.preprocess import Preprocess

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
class Crossed(Model):
    """A trained model's backbone under a column's way to learn new classes, which is an option of the baselines."""

    how: dict[str, Any] = field(default_factory=dict)

    def build(self, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Method, Preprocess]:
        method, preprocess = super().build(device, seed)
        return Baseline(method.extractor(), classes=1, **self.how).to(device).eval(), preprocess


def under(model: Model, column: str, fine_tune: FineTune) -> Crossed:
    """The cell of a model and a column."""
    tuned = {"head": "finetune_all", "epochs": fine_tune.steps, "lr": fine_tune.lr, "norm": fine_tune.norm}
    return Crossed(model.spec, model.weights, model.label, model.dataset, model.code, how=FROZEN.get(column, tuned))


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
    cells: dict[tuple[str, str], np.ndarray] = {}
    for model in models:
        embedded = EmbeddedSplits(under(model, "prototypes", fine_tune), gpus)
        for column in columns:
            frozen, cell = column != TUNED, under(model, column, fine_tune)
            [result] = evaluate(cell, [protocol], gpus, once=embedded.shared_with(cell) if frozen else None)
            cells[model.label, column] = result.accuracies
    return CrossTable(protocol, list(models), list(columns), cells)
