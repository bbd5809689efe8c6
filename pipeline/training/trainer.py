"""Ray Train's trainer, less the parts that have nothing to do."""

from __future__ import annotations

import os
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from pipeline.training.cluster import NO_DASHBOARD


class Trainer(TorchTrainer):
    """A TorchTrainer whose runs end at once on a Ray without a dashboard, and that deals out no datasets.

    Workers stream their own (:mod:`pipeline.data.stream`): Ray Train's process for datasets would start for nothing.
    Ray Train's cleaner frees what a run held when its controller dies, which it learns from the dashboard. Without one
    it would learn nothing, and every run would wait for it, 12 s, at its end. A Ray that was started for a run takes
    everything with it; trials of a campaign are freed by :mod:`pipeline.search.release`.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        idle: tuple[type, ...] = (DatasetsCallback,)
        if os.environ.get(NO_DASHBOARD):
            idle += (PlacementGroupCleanerCallback,)
        return [found for found in callbacks if not isinstance(found, idle)]
