"""The episode plan and a cache of shards at the size of a dataset that nobody here has, without its pixels."""

from __future__ import annotations

import time
import tracemalloc
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from pipeline.data.dataset import ClassTable
from pipeline.data.episodes import EpisodeSpec, plan_episodes

_BLOCK = 64  # episodes planned at once


@dataclass(frozen=True)
class Simulated:
    """What planning costs on a dataset of this size."""

    classes: int
    images: int
    plan_seconds: float  # CPU seconds an episode
    plan_bytes: int  # the most memory that planning a block of episodes took
    table_bytes: int  # of the table of classes, which every planner holds
    shards: int
    shards_an_episode: float  # different ones that its images lie in
    hits: dict[float, float]  # share of the shards that a cache holds -> share of requests that it answers


def table_of(classes: int, images: int) -> ClassTable:
    """Classes of equal size, one after another, as ingest lays them."""
    each = images // classes
    starts = np.arange(classes, dtype=np.int64) * each
    return ClassTable(np.arange(classes, dtype=np.int64), starts, np.full(classes, each, dtype=np.int64), "train")


def simulate(
    classes: int, images: int, spec: EpisodeSpec, episodes: int, rows_per_shard: int, cached: list[float], seed: int = 0
) -> Simulated:
    """Plan ``episodes`` episodes, and follow their images through caches of shards that forget what was not used for
    longest."""
    table = table_of(classes, images)
    shards = -(-images // rows_per_shard)
    caches = {share: _Cache(max(1, int(share * shards))) for share in cached}
    blocks = [np.arange(first, min(first + _BLOCK, episodes)) for first in range(0, episodes, _BLOCK)]
    plan_episodes(table, spec, seed, blocks[0])
    began = time.process_time()
    for numbers in blocks:
        plan_episodes(table, spec, seed, numbers)
    seconds = (time.process_time() - began) / episodes
    tracemalloc.start()
    plan_episodes(table, spec, seed, blocks[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    touched = 0
    for numbers in blocks:
        for rows in plan_episodes(table, spec, seed, numbers).rows:
            wanted = np.unique(rows // rows_per_shard).tolist()
            touched += len(wanted)
            for cache in caches.values():
                for shard in wanted:
                    cache.ask(shard)
    hits = {share: cache.hits / cache.asked for share, cache in caches.items()}
    size = table.ids.nbytes + table.starts.nbytes + table.counts.nbytes
    return Simulated(classes, images, seconds, peak, size, shards, touched / episodes, hits)


class _Cache:
    """Least recently used goes first. It begins full, as after a day of training."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.hits, self.asked = capacity, 0, 0
        self._kept: OrderedDict[int, None] = OrderedDict.fromkeys(range(capacity))

    def ask(self, shard: int) -> None:
        self.asked += 1
        if shard in self._kept:
            self.hits += 1
            self._kept.move_to_end(shard)
            return
        self._kept.popitem(last=False)
        self._kept[shard] = None
