"""Work spread over the cluster: how it is cut, and the embeddings of a split that all its tasks share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch

from pipeline.data.dataset import ClassTable, check_shards, class_table, open_dataset, read_manifest
from pipeline.errors import PipelineError
from pipeline.evaluation.embedded import Embeddings, batch_size, embed_part, possible
from pipeline.evaluation.model import Built, Model, build_on_worker
from pipeline.model import network_shape

EMBED_PART = 1000  # images per task, at most
EMBED_PIXELS = 2**23  # of a channel, per task: what is done is told by tasks that have ended
LEAST = 10  # images of every class, where a split is cut short
PROGRESS_S = 10.0


def cores() -> int:
    """Of the cluster, at least one."""
    return int(max(1, ray.cluster_resources().get("CPU", 1)))


def parts(total: int, size: int) -> list[range]:
    """0..total-1 cut into ranges of at most ``size``."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


class OnCluster:
    """A model where tasks of the cluster find it, each with a core or with ``gpus`` GPUs."""

    def __init__(self, model: Model, gpus: float = 0.0) -> None:
        self.held, self.gpus = ray.put(model), gpus

    def spread(self, work: Callable[..., Any], pieces: Sequence[Any], *about: Any) -> list[Any]:
        """References to ``work(built, piece, *about)``, of every piece by a task that has built the model."""
        task = _work.options(num_cpus=1, num_gpus=self.gpus)
        return [task.remote(work, self.held, self.gpus > 0, piece, *about) for piece in pieces]


@ray.remote
def _work(work: Callable[..., Any], model: Model, gpu: bool, piece: Any, *about: Any) -> Any:
    return work(build_on_worker(model, gpu), piece, *about)


class EmbeddedSplits(OnCluster):
    """What a model's backbone makes of the images of whole splits: computed once, for all who ask, on the cluster."""

    def __init__(self, model: Model, gpus: float = 0.0) -> None:
        super().__init__(model, gpus)
        self._method, self.shape, self._seen = model.build()[0], model.shape, network_shape(model.spec)
        self._found: dict[tuple[str, str, int | None], tuple[ClassTable, Any]] = {}

    def shared_with(self, model: Model) -> EmbeddedSplits:
        """The same for another model with the same backbone."""
        other = EmbeddedSplits(model, self.gpus)
        other._found = self._found
        return other

    def reference(
        self, dataset: str, split: str, images: int, most: int | None = None
    ) -> tuple[ClassTable, Any] | None:
        """The table of a split and a reference to its embeddings [N, D].

        Args:
            images: how many would be embedded otherwise.
            most: images that are embedded, more or less: the first of every class.

        Returns:
            None where the method sees more of an image than its embedding, or where ``images`` cost less.
        """
        table = class_table(read_manifest(dataset), split)
        short = most is not None and int(table.counts.sum()) > most
        key = (dataset, split, most if short else None)
        if key not in self._found:
            if most is not None and short:
                table = replace(table, counts=np.minimum(table.counts, max(LEAST, most // len(table))))
            if not possible(self._method, table, images):
                return None
            self._found[key] = table, self.embed(dataset, table)
        return self._found[key]

    def of(self, dataset: str, split: str, images: int, most: int | None = None) -> Embeddings | None:
        """The same, brought here."""
        found = self.reference(dataset, split, images, most)
        return None if found is None else Embeddings(ray.get(found[1]), found[0])

    def few(self, dataset: str, table: ClassTable) -> Embeddings:
        """Of the images of any table, which nobody else asks for."""
        return Embeddings(ray.get(self.embed(dataset, table)), table)

    def embed(self, dataset: str, table: ClassTable) -> Any:
        """A reference to the embeddings [N, D] of all images of a table."""
        check_shards(dataset)
        total = int(table.counts.sum())
        batch = batch_size(self._seen, self.gpus > 0)
        share = min(EMBED_PART, -(-total // cores()), EMBED_PIXELS // math.prod(self._seen[1:]))
        share = max(1, -(-share // batch)) * batch
        ranges = parts(total, share)
        pieces = self.spread(_embed, ranges, dataset, self.shape, table)
        for done in awaited(pieces):
            images = sum(len(part) for part, piece in zip(ranges, pieces, strict=True) if piece in done)
            print(f"{images:,} of {total:,} images of split {table.split!r} embedded", flush=True)
        return ray.put(np.concatenate(fetched(pieces)))


def _embed(built: Built, part: range, uri: str, shape: tuple[int, int, int], table: ClassTable) -> np.ndarray:
    method, preprocess, device = built
    return embed_part(method.backbone, preprocess, open_dataset(uri, shape), table, part, device)


def surveyed(model: Model, dataset: str, split: str, holdout: float, gpus: float = 0.0) -> Model:
    """The model with what its method summarises of the images it would be trained on, as its weights see them."""
    method, _ = model.build()
    if not method.summarises:
        return model
    table = class_table(read_manifest(dataset), split, "kept", holdout)
    labels, _ = table.images(np.arange(int(table.counts.sum())))
    features = torch.tensor(EmbeddedSplits(model, gpus).few(dataset, table).values)  # Ray's arrays are read-only
    total = method.summarise(features, torch.from_numpy(labels))
    assert total is not None
    method.keep_summary(total, len(labels))
    return replace(model, weights=dict(method.state_dict()))


def fetched(references: Any) -> Any:
    """``ray.get``, but a task's PipelineError as the task said it: as Ray hands it on, its message is a traceback."""
    try:
        return ray.get(references)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            raise error.cause from None
        raise


def awaited(pieces: Sequence[Any]) -> Iterator[set[Any]]:
    """Waits for Ray tasks; tells, now and then, which are done while others are not, and more seldom that none was."""
    waiting, said, patience, told = list(pieces), time.monotonic(), PROGRESS_S, 0
    while waiting:
        _, waiting = ray.wait(waiting, timeout=PROGRESS_S)
        done = set(pieces) - set(waiting)
        if waiting and time.monotonic() - said > (PROGRESS_S if len(done) > told else patience):
            patience = PROGRESS_S if len(done) > told else 2 * patience
            said, told = time.monotonic(), len(done)
            yield done
