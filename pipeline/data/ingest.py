"""From a source's images to a dataset of shards, on Ray Data.

    work orders ──read──► chunks of decoded images ──write──► shards ──► what the driver keeps of every image

Reading (decoding) and writing are tasks anywhere in the cluster; pixels never pass through the driver. Orders, chunks
and shards are cut by the plan alone and keep their order, so that equal input gives equal bytes on any number of
workers. When all shards are written, the driver knows the digest of every image, drops duplicates by rewriting the
shards that hold them, and writes the manifest, which makes the shards a dataset.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import numpy as np
import ray
from pydantic import Field

from pipeline import store
from pipeline.config import Section, validate
from pipeline.data.dataset import read_manifest
from pipeline.data.ingest_tasks import Layout, Written, read_order, rewrite, write_chunks, write_order
from pipeline.data.manifest import Manifest
from pipeline.data.sources.base import HARMLESS, Plan, Report, Skip, Source, small_class
from pipeline.data.sources.by_kind import make_source
from pipeline.data.write import Moments, Target, make_manifest
from pipeline.errors import PipelineError
from pipeline.files import file_sha256
from pipeline.ray_internals import DATA_PROGRESS_LOGGER
from pipeline.ray_start import address_of, join, start_here

SKIPPED_NAME = "skipped.json"


class DataSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$")]
    root: str
    source: dict[str, Any]


class IngestConfig(Section):
    """The configuration of ``jobs.ingest``; ``pipeline/conf/ingest.yaml`` tells what each key means."""

    data: DataSection
    overwrite: bool = False
    max_skipped_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    shard_mb: Annotated[int, Field(ge=1, le=1024)] = 64
    address: str | None = None
    cpus: Annotated[int, Field(ge=1)] | None = None
    object_store_mb: Annotated[int, Field(ge=100)] = 1000

    @property
    def uri(self) -> str:
        return f"{self.data.root.rstrip('/')}/{self.data.name}"


def ingest(config: Mapping[str, Any], progress: bool = True) -> Manifest:
    """Make the dataset that ``config`` describes (see ``IngestConfig``) and return its manifest.

    Raises PipelineError, and leaves nothing behind, when the input is refused or too much of it would be skipped.
    """
    settings = validate(IngestConfig, dict(config))
    source = make_source(settings.data.source)
    layout = Layout.of(source, settings.shard_mb * 2**20)
    target = Target(settings.uri, settings.overwrite)
    written: list[Written] = []
    try:
        with _no_collection():
            report = print if progress else _silent
            source.kept = _kept_splits(target, report)
            plan = source.plan(layout.order_rows, report)
        with ThreadPoolExecutor(1) as pool, _ray(settings):
            checksums = pool.submit(_checksums, plan.archives)
            _write_all(source, plan, layout, target, progress, written)
            skipped = plan.skipped + [skip for part in written for skip in part.rows.skipped]
            duplicates = find_duplicates(plan, written)
            dropped: set[tuple[int, int]] = set()
            if not source.keep_duplicates:
                skipped += [skip for _, _, skip in duplicates]
                dropped = {(position, row) for position, row, _ in duplicates}
            _refuse_many(skipped, sum(len(part.rows.names) for part in written), settings)
            small = find_small(plan, written, dropped, source.min_images)
            skipped += [skip for _, skip in small]
            dropped |= {place for places, _ in small for place in places}
            _drop(dropped, written, layout, target, progress)
            plan.source["archives"] = checksums.result()
        kept = [skip for _, _, skip in duplicates] if source.keep_duplicates else []
        manifest = _manifest(settings, plan, layout, written, skipped)
        with store.writing(settings.uri, "data.root"):
            target.commit(manifest, {SKIPPED_NAME: _skipped_file(skipped, kept)})
        return manifest
    except BaseException:
        target.abort([part.shard for part in written if part.shard])
        raise


def _kept_splits(target: Target, report: Report) -> dict[str, str]:
    """The split of every class of the dataset that is replaced: a manifest is the memory, whatever is asked for now."""
    if target.current is None:
        return {}
    try:
        manifest = read_manifest(target.current)
    except PipelineError as error:
        report(f"{error}: the splits of its classes are not known any more, and are made anew")
        return {}
    return {manifest.class_names[number]: split for split, names in manifest.splits.items() for number in names}


def find_duplicates(plan: Plan, written: list[Written]) -> list[tuple[int, int, Skip]]:
    """Images whose content came before: position in ``written``, row in that shard, and which image it repeats."""
    first: dict[bytes, tuple[str, int]] = {}
    found = []
    for position, part in enumerate(written):
        rows = part.rows
        for row, (digest, name, number) in enumerate(zip(rows.digests, rows.names, rows.classes.tolist(), strict=True)):
            image = (name, number)
            original, owner = before = first.setdefault(digest, image)
            if before is not image:
                reason = "duplicate_in_class" if owner == number else "duplicate_across_classes"
                skip = Skip(name, plan.classes[number], reason, f"is {original} of class {plan.classes[owner]}")
                found.append((position, row, skip))
    return found


def find_small(
    plan: Plan, written: list[Written], dropped: set[tuple[int, int]], least: int
) -> list[tuple[list[tuple[int, int]], Skip]]:
    """Classes that have too few images without those ``dropped``: where their images are (position, row), and why."""
    places: dict[int, list[tuple[int, int]]] = {}
    for position, part in enumerate(written):
        for row, number in enumerate(part.rows.classes.tolist()):
            if (position, row) not in dropped:
                places.setdefault(number, []).append((position, row))
    return [
        (found, small_class(plan.classes[number], len(found), least))
        for number, found in sorted(places.items())
        if len(found) < least
    ]


def _write_all(
    source: Source, plan: Plan, layout: Layout, target: Target, progress: bool, written: list[Written]
) -> None:
    """Read all orders and write all shards; ``written`` grows as shards are done."""
    orders = [{"number": number, "order": pickle.dumps(order)} for number, order in enumerate(plan.orders)]
    dataset = _dataset(orders, progress)
    places: dict[str, Any] = {"layout": layout, "place": target.place, "current": target.current}
    if source.grows:
        done = dataset.map_batches(partial(write_order, source=source, **places), batch_size=1)
    else:
        chunks = dataset.map_batches(partial(read_order, source=source, chunk_rows=layout.chunk_rows), batch_size=1)
        # Another share of a CPU keeps Ray Data from fusing the two: a task would read all chunks of a shard one by one.
        done = chunks.map_batches(
            partial(write_chunks, **places), batch_size=layout.chunks, batch_format="pyarrow", num_cpus=0.5
        )
    images = 0
    for row in done.iter_rows():
        result = _result(row)
        written.append(result)
        images += len(result.rows.names)
        if progress and not sys.stdout.isatty():
            print(f"{images:,} of {plan.images:,} images written" if plan.images else f"{images:,} images written")
    order = [chunk for part in written for chunk in part.chunks]
    uneven = not source.grows and any(len(part.chunks) != layout.chunks for part in written[:-1])
    if order != sorted(order) or uneven:
        raise RuntimeError("chunks reached their shards out of order")


def _result(row: dict[str, Any]) -> Written:
    result: Written | str = pickle.loads(row["written"])
    if isinstance(result, str):
        raise PipelineError(result)
    return result


def _drop(places: set[tuple[int, int]], written: list[Written], layout: Layout, target: Target, progress: bool) -> None:
    """Replace the shards that hold images to leave out (position in ``written``, row) by shards without them."""
    if not places:
        return
    dropped: dict[int, set[int]] = {}
    for position, row in sorted(places):
        dropped.setdefault(position, set()).add(row)
    work = [{"work": pickle.dumps((written[position], rows))} for position, rows in dropped.items()]
    where: dict[str, Any] = {"layout": layout, "place": target.place, "current": target.current}
    done = _dataset(work, progress).map_batches(partial(rewrite, **where), batch_size=1)
    for changed, result in zip(dropped, done.iter_rows(), strict=True):
        written[changed] = _result(result)


def _dataset(items: list[dict[str, Any]], progress: bool) -> ray.data.Dataset:
    """One block an item, in order."""
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # making a dataset sets it to INFO
    logging.getLogger(DATA_PROGRESS_LOGGER).setLevel(logging.ERROR)  # it warns where there are no bars
    dataset.context.execution_options.preserve_order = True
    # Of two cores it would keep half a one for the writers, and so one of them idle while there is nothing to write.
    dataset.context.op_resource_reservation_enabled = False
    dataset.context.target_max_block_size = 1  # a block ends with every chunk: shards are made of whole numbers of them
    dataset.context.enable_progress_bars = progress and sys.stdout.isatty()
    dataset.context.enable_rich_progress_bars, dataset.context.use_ray_tqdm = True, False
    return dataset


def _refuse_many(skipped: list[Skip], images: int, settings: IngestConfig) -> None:
    held = [skip for skip in skipped if skip.reason not in HARMLESS]
    total = images + sum(not skip.reason.startswith("duplicate") for skip in held)
    if not images:
        raise PipelineError(f"data.source holds no usable images{_examples(held)}")
    if len(held) > settings.max_skipped_fraction * total:
        raise PipelineError(
            f"{len(held):,} of {total:,} files cannot be used, more than max_skipped_fraction="
            f"{settings.max_skipped_fraction:g}{_examples(held)}"
        )


def _examples(skipped: list[Skip]) -> str:
    if not skipped:
        return ""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(_counts(skipped).items()))
    return f": {counts}; the first is {skipped[0].file} ({skipped[0].detail or skipped[0].reason})"


def _counts(skipped: list[Skip]) -> dict[str, int]:
    return dict(sorted(Counter(skip.reason for skip in skipped).items()))


def _manifest(
    settings: IngestConfig, plan: Plan, layout: Layout, written: list[Written], skipped: list[Skip]
) -> Manifest:
    channels = layout.shape[0]
    counts = np.zeros(len(plan.classes), dtype=np.int64)
    totals, squares = (np.zeros((len(plan.classes), channels), dtype=np.int64) for _ in range(2))
    for part in written:
        np.add.at(counts, part.rows.classes, 1)
        np.add.at(totals, part.rows.classes, part.rows.totals)
        np.add.at(squares, part.rows.classes, part.rows.squares)
    area = layout.shape[1] * layout.shape[2]
    present = {name: number for number, name in enumerate(plan.classes) if counts[number]}
    small = {skip.class_name for skip in skipped if skip.reason == "small_class"}
    empty = [name for name in plan.classes if name not in present and name not in small]
    skipped += [Skip("", name, "empty_class", "no usable image") for name in empty]
    splits = {split: [name for name in names if name in present] for split, names in plan.splits.items()}
    for split, names in splits.items():
        if not names:
            raise PipelineError(
                f"split {split!r} has no class with usable images; see the class folders, the splits or "
                "data.source.min_images"
            )
    return make_manifest(
        settings.data.name,
        layout.shape,
        layout.encoding,
        {name: int(counts[number]) for name, number in present.items()},
        splits,
        {name: Moments(int(counts[n]) * area, totals[n].tolist(), squares[n].tolist()) for name, n in present.items()},
        [part.shard for part in written if part.shard],
        plan.rotations,
        plan.source,
        _counts(skipped),
    )


def _skipped_file(skipped: list[Skip], kept: list[Skip]) -> bytes:
    def listed(skips: list[Skip]) -> list[dict[str, str]]:
        return [{"file": s.file, "class": s.class_name, "reason": s.reason, "detail": s.detail} for s in skips]

    left_out = {"left_out": _counts(skipped), "files": listed(skipped)}
    stayed = {"kept": _counts(kept), "kept_files": listed(kept)}
    return (json.dumps({**left_out, **stayed}, indent=1) + "\n").encode()


def _checksums(archives: list[str]) -> dict[str, str]:
    return {os.path.basename(path): file_sha256(path) for path in archives}


@contextmanager
def _no_collection() -> Iterator[None]:
    """Listing makes an object a file and no garbage: looking for it would take as long as the listing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _silent(message: str) -> None:
    """Say nothing."""


@contextmanager
def _ray(settings: IngestConfig) -> Iterator[None]:
    """The Ray that runs already, the cluster of ``address`` or of a submitted job, or one of this machine's own."""
    if ray.is_initialized():
        yield
        return
    address = address_of(settings.address)
    if address:
        join(address, "address")
    else:
        start_here(settings.cpus, settings.object_store_mb)
    try:
        yield
    finally:
        ray.shutdown()
