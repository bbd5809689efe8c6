"""A dataset's features by a frozen network, on Ray Data: ranges of rows ──actors──► shards ──► a manifest.

An actor holds the network, gathers its images from the mapped shards of the dataset, and writes a shard of features
beside a record of it. Neither pixels nor features travel. Shards are cut by the dataset alone and batches by the size
of its images, so that equal input gives equal bytes on any number of cores; what a killed job had written is not
computed again.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import ray
import torch

from pipeline import store
from pipeline.data import shards
from pipeline.data.augment import Augmentation
from pipeline.data.dataset import check_shards, open_dataset, whole_table
from pipeline.data.features import NETWORK, Network
from pipeline.data.manifest import FEATURES, Manifest, ShardInfo, turned_name
from pipeline.data.write import Target, is_whole, rows_per_shard, write_shard
from pipeline.errors import PipelineError, Unavailable
from pipeline.evaluation.embedded import View, batch_size, embed_part
from pipeline.evaluation.spread import cores
from pipeline.files import sha256
from pipeline.model import build_preprocess, network_shape
from pipeline.nets import build_backbone
from pipeline.nets.own_code import send
from pipeline.ray_internals import one_block_each
from pipeline.weights import own_sources

LEAST_ROWS, SHARDS = 256, 64  # a shard is no smaller; a dataset of its size or more has so many, for as many cores
ATTEMPTS = 3  # at a shard, where it fails; actors that are lost with their node are replaced by Ray Data
PROGRESS_S = 5.0
_RECORD = re.compile(r"part-([0-9a-f]{16})-(\d{6,})\.json")  # of a shard: what work it is of, and its number


@dataclass(frozen=True)
class Embedding:
    """What is computed: all that decides the bytes."""

    dataset: str  # folder or URI of the images
    network: Network
    batch: int  # images through the network at once
    shard_bytes: int
    views: int = 0
    augmentation: Augmentation = Augmentation()
    seed: int = 0  # of the views
    code: Mapping[str, str] | None = None  # the user's own of the network, for processes where its file is not

    @classmethod
    def of(cls, dataset: str, network: Network, batch: int | None, shard_bytes: int, gpu: bool) -> Embedding:
        batch = batch or batch_size(network_shape({"input": network.input}), gpu)
        return cls(dataset, network, batch, shard_bytes, code=own_sources({"backbone": network.backbone}))

    def describe(self, manifest: Manifest) -> dict[str, Any]:
        """ "network" of the manifest of the features of ``manifest``'s images."""
        about = {"dataset": {"name": manifest.name, "fingerprint": manifest.fingerprint}, "batch": self.batch}
        views = {"augmentation": asdict(self.augmentation), "seed": self.seed} if self.views else {}
        return {**self.network.description, **about, **views}

    def parts(self, images: int, features: int) -> list[tuple[int, range]]:
        """The view and the rows of every shard; 0: the images as they are."""
        by_count = max(LEAST_ROWS, -(-images // SHARDS))
        rows = min(by_count, rows_per_shard((4 * features, 1, 1), self.shard_bytes))
        share = -(-rows // self.batch) * self.batch
        starts = range(0, images, share)
        return [(view, range(s, min(s + share, images))) for view in range(1 + self.views) for s in starts]


def embed_dataset(
    embedding: Embedding, target: Target, name: str, source: dict[str, Any], gpus: float = 0.0,
    say: Callable[[str], None] = print,
) -> Manifest:  # fmt: skip
    """Compute the features that are missing at ``target``, and make them a dataset.

    Raises:
        PipelineError: the dataset is damaged, the network's features are not finite, or the place cannot be written.
    """
    check_shards(embedding.dataset)
    images = open_dataset(embedding.dataset).manifest
    features = int(load_network(embedding.network).out_features)  # type: ignore[arg-type]
    described = embedding.describe(images)
    parts = embedding.parts(images.rows * len(images.rotations), features)
    plan = [described, [[view, part.start, part.stop] for view, part in parts]]
    digest = sha256(json.dumps(plan, sort_keys=True).encode())
    done = _done(target.place, digest)
    missing = [number for number in range(len(parts)) if number not in done]
    if done and missing:
        say(f"{len(done):,} of {len(parts):,} shards are there already")
    total, began, said = sum(len(parts[number][1]) for number in missing), time.monotonic(), time.monotonic()
    embedded = 0
    for number, shard in _computed(embedding, target, parts, missing, digest, gpus):
        done[number] = shard
        embedded += len(parts[number][1])
        if time.monotonic() - said > PROGRESS_S or embedded == total:
            said = time.monotonic()
            say(f"{embedded:,} of {total:,} images embedded, {embedded / (said - began):,.0f} a second")
    written = [done[number] for number in range(len(parts))]
    manifest = _manifest(images, name, features, described, source, written, embedding.views)
    with store.writing(target.uri, "data.root"):
        target.commit(manifest, {NETWORK: embedding.network.content})
    store.remove_files(target.uri, [file for file in store.list_names(target.uri) if _RECORD.fullmatch(file)])
    return manifest


def _computed(
    embedding: Embedding, target: Target, parts: list[tuple[int, range]], missing: list[int], digest: str, gpus: float
) -> Iterator[tuple[int, ShardInfo]]:
    if not missing:
        return
    work = [{"number": number, "view": parts[number][0], "start": parts[number][1].start,
             "stop": parts[number][1].stop} for number in missing]  # fmt: skip
    dataset = one_block_each(work)
    context = dataset.context
    context.enable_progress_bars, context.print_on_execution_start = False, False
    actors = int(ray.cluster_resources().get("GPU", 0) // gpus) if gpus else cores()
    held = ray.put(embedding)
    done = dataset.map_batches(
        Embedder,
        fn_constructor_kwargs={"held": held, "place": target.place, "current": target.current, "digest": digest,
                               "gpu": gpus > 0},
        batch_size=1, zero_copy_batch=True, num_cpus=1, num_gpus=gpus or None,
        compute=ray.data.ActorPoolStrategy(size=max(1, min(actors, len(missing)))),
    )  # fmt: skip
    for row in done.iter_rows():
        if row["refused"]:
            raise (Unavailable if row["later"] else PipelineError)(row["refused"])
        yield int(row["number"]), ShardInfo(**json.loads(row["shard"]))


class Embedder:
    """An actor of Ray Data: the network, and the dataset of images."""

    def __init__(self, held: Any, place: str, current: str | None, digest: str, gpu: bool) -> None:
        torch.set_num_threads(1)
        self.embedding: Embedding = ray.get(held) if isinstance(held, ray.ObjectRef) else held
        send(self.embedding.code)
        self.place, self.current, self.digest = place, current, digest
        self.device = torch.device("cuda" if gpu else "cpu")
        self.dataset = open_dataset(self.embedding.dataset)
        self.table = whole_table(self.dataset.manifest)
        self.network = load_network(self.embedding.network).to(self.device)
        self.preprocess = build_preprocess({"input": self.embedding.network.input}).to(self.device)
        self.values = np.empty((0, 0), dtype=np.float32)  # of the largest part so far, used again

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        number, view, start, stop = (int(batch[key][0]) for key in ("number", "view", "start", "stop"))
        for attempt in range(ATTEMPTS):
            try:
                shard, refused, later = self._write(number, view, range(start, stop)), "", False
            except PipelineError as error:  # travels as text, so that it ends in one line
                shard, refused, later = "", str(error), isinstance(error, Unavailable)
            except Exception:  # of a GPU that others use too, say: one shard shall not end hours of work
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(1)
                continue
            return {"number": [number], "shard": [shard], "refused": [refused], "later": [later]}
        raise AssertionError

    def _write(self, number: int, view: int, part: range) -> str:
        how = self.embedding
        seen = View(view, how.augmentation, how.seed) if view else None
        if len(self.values) < len(part):
            self.values = np.empty((len(part), int(self.network.out_features)), dtype=np.float32)  # type: ignore[arg-type]
        values = embed_part(
            self.network, self.preprocess, self.dataset, self.table, part, self.device, how.batch, seen, self.values
        )
        if not np.isfinite(values).all():
            raise PipelineError("the network gives features that are NaN or infinite: its weights are damaged")
        with store.writing(self.place, "data.root"):
            shard = write_shard(self.place, shards.raw_table(values[..., None, None]), self.current)
            record = json.dumps(asdict(shard))
            name = f"part-{self.digest[:16]}-{number:06d}.json"
            store.write_bytes(store.join(self.place, name), record.encode())
        return record


def load_network(network: Network) -> torch.nn.Module:
    """The backbone with its weights, in evaluation mode."""
    backbone = build_backbone(network.backbone, network_shape({"input": network.input}))
    backbone.load_state_dict(network.weights)
    return backbone.eval()


def _manifest(
    images: Manifest, name: str, features: int, network: dict[str, Any], source: dict[str, Any],
    written: list[ShardInfo], views: int,
) -> Manifest:  # fmt: skip
    """Of the features: every class that is another one turned is a class of its own, by the id that it had."""
    turns = images.rotations
    names = [turned_name(known, turn) for known in images.class_names for turn in turns]
    return replace(
        images,
        name=name,
        shape=(features, 1, 1),
        encoding=FEATURES,
        class_names=names,
        class_counts=[count for count in images.class_counts for _ in turns],
        splits={
            split: [member * len(turns) + turn for member in members for turn in range(len(turns))]
            for split, members in images.splits.items()
        },
        mean=[], std=[], shards=written, rotations=[0], source=source, skipped={}, network=network, views=views,
    )  # fmt: skip


def _done(place: str, digest: str) -> dict[int, ShardInfo]:
    """The shards of the same work that an interrupted job wrote whole."""
    found = {}
    for file in store.list_names(place):
        record = _RECORD.fullmatch(file)
        if record and record[1] == digest[:16]:
            shard = ShardInfo(**json.loads(store.read_bytes(store.join(place, file))))
            if is_whole(store.join(place, shard.file), shard.sha256):
                found[int(record[2])] = shard
    return found
