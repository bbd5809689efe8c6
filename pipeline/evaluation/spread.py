"""Work spread over the cluster: how it is cut, and the embeddings of a split that all its tasks share."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

from pipeline.data.dataset import class_table, open_dataset, read_manifest
from pipeline.evaluation.embedded import embed_part
from pipeline.evaluation.model import Model, build_on_worker

EMBED_PART = 1000  # images per task, at least


def cores() -> int:
    """Of the cluster, at least one."""
    return int(max(1, ray.cluster_resources().get("CPU", 1)))


def parts(total: int, size: int) -> list[np.ndarray]:
    """0..total-1 cut into ranges of at most ``size``."""
    return [np.arange(start, min(start + size, total)) for start in range(0, total, size)]


def embed_split(held: Any, dataset: str, split: str, gpus: float, seed: int = 0) -> Any:
    """A reference to the embeddings [N, D] of a whole split, by the model that ``held`` refers to."""
    total = int(class_table(read_manifest(dataset), split).counts.sum())
    task = _embed_part.options(num_cpus=1, num_gpus=gpus)
    share = max(EMBED_PART, -(-total // (4 * cores())))
    pieces = [
        task.remote(held, seed, dataset, split, range(int(part[0]), int(part[-1]) + 1), gpus > 0)
        for part in parts(total, share)
    ]
    return ray.put(np.concatenate(ray.get(pieces)))


@ray.remote
def _embed_part(model: Model, seed: int, uri: str, split: str, part: range, gpu: bool) -> np.ndarray:
    method, preprocess, device = build_on_worker(model, gpu, seed)
    dataset = open_dataset(uri, model.shape)
    return embed_part(method, preprocess, dataset, class_table(dataset.manifest, split), part, device)
