"""The stream: plans through Ray Data to each worker, pixels gathered from the memory map into buffers used again.

Every worker streams its own share of every step: Ray Data computes blocks of plans in the cluster, ahead of the
training and in order, and a thread of the worker gathers the pixels. A plan is three arrays of row numbers, so
little travels. ``materialize`` chooses where pixels are gathered: in the ``worker`` (default), in the ``cluster``
(for encoded images, whose decoding is then spread; by the worker while all CPUs are taken) or from a copy of the
dataset on the ``device``. The bytes are the same.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import ray
import torch

from pipeline.batch import Batch
from pipeline.data.batches import to_batch
from pipeline.data.dataset import Dataset
from pipeline.data.episodes import AnyPlan
from pipeline.data.plan_source import PlanSource, decode
from pipeline.data.planners import TASK_CPUS, Planner
from pipeline.ray_internals import autoscaler_limits, rest_between_turns

MATERIALIZE = ("worker", "cluster", "device")
PLANNERS = 4  # tasks at once that plan for one worker
PLANNED_HERE = 64  # steps at once, where there are none
_AHEAD = 2, 16  # batches that wait, gathered, for the training step: at least, and at most where they are small
_AHEAD_BYTES = 8 * 2**20  # small ones, together: a step on features takes less time than the next block of plans


class Stream:
    """Iterates over ``(step, batch)`` of one worker, uint8 (or features) on ``device``; counts the seconds it waited.

    A batch is valid until the next one is asked for: its buffer is used again. ``planned_here``: in this process,
    without Ray Data, for one that trains many short runs.
    """

    def __init__(
        self,
        dataset: Dataset,
        planner: Planner,
        first: int,
        last: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        materialize: str = "worker",
        planned_here: bool = False,
    ) -> None:
        if planner.per_step % world_size:
            raise ValueError(f"{planner.per_step} a step cannot be shared equally by {world_size} workers")
        self.dataset, self.planner = dataset, planner
        self.device, self.materialize = torch.device(device), materialize
        self.rank, self.world_size = rank, world_size
        self.first, self.last, self.planned_here = first, last, planned_here
        self.waited = 0.0  # seconds
        self._resident = (
            torch.from_numpy(dataset.gather(np.arange(dataset.manifest.stored_rows))).to(device)
            if materialize == "device"
            else None
        )

    def __iter__(self) -> Generator[tuple[int, Batch], None, None]:
        ahead, stop = self._ahead(), threading.Event()
        ready: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        thread = threading.Thread(target=self._produce, args=(ready, ahead, stop), name="gather", daemon=True)
        thread.start()
        expected = self.first
        try:
            while expected < self.last:
                began = time.perf_counter()
                item = ready.get()
                self.waited += time.perf_counter() - began
                if isinstance(item, BaseException):
                    raise item
                step, rank, batch = item
                if (step, rank) != (expected, self.rank):
                    raise RuntimeError(f"the stream gave step {step} of rank {rank}, not {expected} of {self.rank}")
                yield step, batch
                expected += 1
        finally:
            stop.set()
            while thread.is_alive():  # it may wait for room in the queue
                with contextlib.suppress(queue.Empty):
                    ready.get_nowait()
                thread.join(timeout=0.05)

    def _ahead(self) -> int:
        """How many batches wait; by the size of the first."""
        rows = self.planner.plan(self.first, self.rank, self.world_size).pixel_rows.size
        size = rows * math.prod(self.dataset.shape) * self.dataset.manifest.dtype.itemsize
        return max(_AHEAD[0], min(_AHEAD[1], _AHEAD_BYTES // max(1, size)))

    def _produce(self, ready: queue.Queue[Any], ahead: int, stop: threading.Event) -> None:
        try:
            buffers = _Ring(ahead + 2, self.dataset.shape, self.dataset.manifest.dtype, self.device)
            for step, rank, plan, pixels in self._plans(stop):
                batch = to_batch(plan, self._pixels(plan, pixels, buffers), self.dataset.manifest.rotations)
                while not stop.is_set():
                    try:
                        ready.put((step, rank, batch), timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if stop.is_set():
                    return
        except BaseException as error:  # the training thread raises it
            if not stop.is_set():
                ready.put(error)

    def _plans(self, stop: threading.Event) -> Iterator[tuple[int, int, AnyPlan, Any]]:
        if self.planned_here:
            for first in range(self.first, self.last, PLANNED_HERE):
                count = min(PLANNED_HERE, self.last - first)
                plans: Sequence[AnyPlan] = self.planner.plans(first, count, self.rank, self.world_size)
                for step, plan in enumerate(plans, first):
                    yield step, self.rank, plan, None
            return
        first, said = self.first, self.rank != 0
        while first < self.last and not stop.is_set():
            spread = self.materialize == "cluster" and _room_to_gather()
            if self.materialize == "cluster" and not (spread or said):
                print("all CPUs of the cluster are taken: the workers gather the pixels themselves", flush=True)
                said = True
            uri = self.dataset.uri if spread else None
            source = PlanSource(self.planner, first, self.last, self.rank, self.world_size, uri)
            yield from self._plans_of(source, spread, stop)
            first = source.last

    def _plans_of(
        self, source: PlanSource, spread: bool, stop: threading.Event
    ) -> Iterator[tuple[int, int, AnyPlan, Any]]:
        """Planning takes milliseconds and reserves nothing, or runs that share a cluster would take its last CPU from
        each other's planning and stand still together; gathering and decoding take what others could use."""
        share: dict[str, Any] = {"num_cpus": 0, "concurrency": min(PLANNERS, source.blocks)}
        if spread:
            share = {"num_cpus": TASK_CPUS}
        blocks = ray.data.read_datasource(source, override_num_blocks=source.blocks, **share)
        blocks.context.execution_options.preserve_order = True
        blocks.context.enable_progress_bars = False
        blocks.context.print_on_execution_start = False
        rest_between_turns(blocks.context)
        for block in blocks.iterator().iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            for row in range(block.num_rows):
                if stop.is_set():
                    return
                plan = decode(block["shape"][row].as_py(), block["plan"][row].as_buffer())
                pixels = block["pixels"][row]
                yield block["step"][row].as_py(), block["rank"][row].as_py(), plan, pixels

    def _pixels(self, plan: AnyPlan, streamed: Any, buffers: _Ring) -> torch.Tensor:
        """Pixels uint8 [N, C, H, W] (of features, float32) on the device, in the order of the plan's rows."""
        rows = plan.pixel_rows
        if self._resident is not None:
            return self._resident.index_select(0, torch.from_numpy(rows.copy()).to(self.device))
        buffer = buffers.take(len(rows))
        if streamed is not None and streamed.is_valid:
            buffer.numpy().reshape(-1)[:] = np.frombuffer(streamed.as_buffer(), dtype=self.dataset.manifest.dtype)
        else:
            self.dataset.gather(rows, out=buffer.numpy())
        return buffers.send(buffer)


def _room_to_gather() -> bool:
    """Whether a task that gathers pixels finds a place: on a full cluster it would be waited for until others end.

    The free CPUs may lie on many nodes, of which one must have enough; an autoscaler brings what there is not.
    """
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    return ray.available_resources().get("CPU", 0.0) >= TASK_CPUS * nodes or bool(autoscaler_limits())


class _Ring:
    """Buffers that are used in turn: pinned, and guarded by an event, where the batch goes to a GPU."""

    def __init__(self, depth: int, shape: tuple[int, int, int], dtype: np.dtype[Any], device: torch.device) -> None:
        self._dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        self._shape, self._device, self._turn = shape, device, 0
        self._buffers: list[torch.Tensor | None] = [None] * depth
        self._copied: list[Any] = [None] * depth

    def take(self, images: int) -> torch.Tensor:
        """A buffer for ``images`` images, once nothing reads it any more."""
        self._turn = (self._turn + 1) % len(self._buffers)
        if self._copied[self._turn] is not None:
            self._copied[self._turn].synchronize()
        buffer = self._buffers[self._turn]
        if buffer is None or len(buffer) < images:
            pinned = self._device.type == "cuda"
            buffer = torch.empty((images, *self._shape), dtype=self._dtype, pin_memory=pinned)
            self._buffers[self._turn] = buffer
        return buffer[:images]

    def send(self, buffer: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cuda":
            return buffer
        moved = buffer.to(self._device, non_blocking=True)
        self._copied[self._turn] = torch.cuda.Event()
        self._copied[self._turn].record()
        return moved
