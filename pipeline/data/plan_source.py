"""Plans as a source of Ray Data: blocks of consecutive steps of one worker, computed by tasks anywhere in the cluster.

Knows no torch: its import would be most of what a planning task does before a run's first step.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline.data.dataset import open_dataset
from pipeline.data.episodes import AnyPlan, ImagePlan, Plan
from pipeline.data.planners import Planner

_BLOCK_STEPS = 64, 1024  # of the first block, so that training begins early, and of the largest: each is twice the last
_BLOCK_BYTES = 32 * 2**20
_BLOCKS = 256  # of one source: Ray Data lists them all before the first, so that a long run would begin late

_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("rank", pa.int32()),
        ("shape", pa.list_(pa.int64())),  # episodes, columns, way, support; images
        ("plan", pa.large_binary()),
        ("pixels", pa.large_binary()),
    ]
)


class PlanSource(Datasource):
    """Steps from ``first`` of one worker as blocks of consecutive steps; up to ``self.last``, at most ``last``."""

    def __init__(self, planner: Planner, first: int, last: int, rank: int, world_size: int, uri: str | None) -> None:
        super().__init__()
        self._planner = ray.put(planner)
        self._worker = (rank, world_size)
        self._uri = uri  # where to gather pixels from, or None to send plans alone
        sample = planner.plan(first, rank, world_size)
        per_step = sample.pixel_rows.nbytes * 2 + (sample.pixel_rows.size * _image_bytes(uri) if uri else 0)
        self._blocks = _blocks(first, last, largest=max(1, _BLOCK_BYTES // max(1, per_step)))
        self.first, self.last = first, self._blocks[-1].stop

    @property
    def blocks(self) -> int:
        return len(self._blocks)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        tasks = []
        for steps in self._blocks:
            metadata = BlockMetadata(num_rows=len(steps), size_bytes=None, input_files=None, exec_stats=None)
            read = functools.partial(_plan_block, self._planner, self._uri, steps.start, len(steps), *self._worker)
            tasks.append(ReadTask(read, metadata, schema=_SCHEMA))
        return tasks


def _blocks(first: int, last: int, largest: int) -> list[range]:
    """The steps of each block: small ones first, then fewer and larger, for a new block is waited for a little."""
    blocks: list[range] = []
    steps, most = _BLOCK_STEPS
    while first < last and len(blocks) < _BLOCKS:
        blocks.append(range(first, min(last, first + min(steps, largest))))
        first, steps = blocks[-1].stop, min(2 * steps, most)
    return blocks


def _plan_block(planner: Any, uri: str | None, first: int, count: int, rank: int, world_size: int) -> list[pa.Table]:
    plans: Sequence[AnyPlan] = ray.get(planner).plans(first, count, rank, world_size)
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for offset, plan in enumerate(plans):
        columns["step"].append(first + offset)
        columns["rank"].append(rank)
        shape, content = encode(plan)
        columns["shape"].append(shape)
        columns["plan"].append(content)
        columns["pixels"].append(open_dataset(uri).gather(plan.pixel_rows).tobytes() if uri else None)
    return [pa.table(columns, schema=_SCHEMA)]


def _image_bytes(uri: str) -> int:
    manifest = open_dataset(uri).manifest
    return int(np.prod(manifest.shape)) * manifest.dtype.itemsize


def encode(plan: AnyPlan) -> tuple[list[int], bytes]:
    """A plan as its shape and one run of bytes."""
    arrays = [plan.numbers, plan.rows, plan.labels, plan.classes]
    content = b"".join(np.ascontiguousarray(array, dtype=np.int64).tobytes() for array in arrays)
    if isinstance(plan, ImagePlan):
        return [0, 0, 0, 0, len(plan)], content
    images, more = (0, b"") if plan.auxiliary is None else (len(plan.auxiliary), encode(plan.auxiliary)[1])
    return [len(plan), plan.rows.shape[1], plan.way, plan.support, images], content + more


def decode(shape: list[int], content: Any) -> AnyPlan:
    episodes, columns, way, support, images = shape
    values = np.frombuffer(content, dtype=np.int64)
    if episodes == 0:
        return ImagePlan(*values.reshape(4, images))
    square = (episodes, columns)
    ends = np.cumsum([episodes, episodes * columns, episodes * columns, episodes * way])
    numbers, rows, labels, classes, rest = np.split(values, ends)
    auxiliary = ImagePlan(*rest.reshape(4, images)) if images else None
    return Plan(
        numbers, rows.reshape(square), labels.reshape(square), classes.reshape(episodes, way), support, auxiliary
    )
