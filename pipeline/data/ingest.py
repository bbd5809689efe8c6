"""From a source's images to a dataset of shards, on Ray Data.

    work orders ──read──► chunks of decoded images ──write──► shards ──► what the driver keeps of every image

Reading (decoding) and writing are tasks anywhere in the cluster; pixels never pass through the driver. Orders, chunks
and shards are cut by the plan alone and keep their order, so that equal input gives equal bytes on any number of
workers. When all shards are written, the driver knows the digest of every image, drops duplicates by rewriting the
shards that hold them, and writes the manifest, which makes the shards a dataset.
"""

import gc
import json
import os
import pickle
import sys
import unicodedata
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
from pipeline.data.archives import meant
from pipeline.data.dataset import read_manifest
from pipeline.data.ingest_tasks import Layout, Rows, Written, read_order, rewrite, write_chunks, write_order
from pipeline.data.manifest import Manifest, ShardInfo
from pipeline.data.sources.base import HARMLESS, Plan, Report, Skip, Source, small_class
from pipeline.data.sources.by_kind import make_source
from pipeline.data.write import ClassSums, Target, make_manifest
from pipeline.errors import PipelineError
from pipeline.files import file_sha256
from pipeline.ray_internals import one_block_each
from pipeline.ray_start import address_of, join, start_here

SKIPPED_NAME = "skipped.json"


class DataSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$")]
    root: str
    source: dict[str, Any]

    @property
    def uri(self) -> str:
        return store.join(self.root, self.name)


class IngestConfig(Section):
    """The configuration of ``jobs.ingest``; ``pipeline/conf/ingest.yaml`` tells what each key means."""

    data: DataSection
    overwrite: bool = False
    max_skipped_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    shard_mb: Annotated[int, Field(ge=1, le=1024)] = 64
    address: str | None = None
    cpus: Annotated[int, Field(ge=1)] | None = None
    object_store_mb: Annotated[int, Field(ge=100)] = 1000


def ingest(config: Mapping[str, Any], progress: bool = True) -> Manifest:
    """Make the dataset that ``config`` describes (see ``IngestConfig``) and return its manifest.

    Raises PipelineError, and leaves nothing behind, when the input is refused or too much of it would be skipped.
    """
    settings = validate(IngestConfig, dict(config))
    source = make_source(settings.data.source)
    layout = Layout.of(source, settings.shard_mb * 2**20)
    target = Target(settings.data.uri, settings.overwrite)
    written: list[Written] = []
    try:
        with _no_collection():
            report: Report = print if progress else lambda message: None
            source.kept = _kept_splits(target, report)
            plan = source.plan(layout.order_rows, report)
        with ThreadPoolExecutor(1) as pool, _ray(settings):
            checksums = pool.submit(lambda: {os.path.basename(path): file_sha256(path) for path in plan.archives})
            _write_all(source, plan, layout, target, progress, written)
            skipped = plan.skipped + [skip for part in written for skip in part.rows.skipped]
            if not any(part.rows.names for part in written):
                raise PipelineError(f"data.source holds no usable images{_examples(_held(skipped))}")
            rows = Rows.join([part.rows for part in written])
            stays, duplicates, small = _chosen(plan, rows, source)
            skipped += [] if source.keep_duplicates else duplicates.values()
            _refuse_many(skipped, len(stays), settings)
            skipped += small
            _rewrite(written, stays, layout, target, progress)
            plan.source["archives"] = checksums.result()
        kept = [*duplicates.values()] if source.keep_duplicates else []
        manifest = _manifest(settings, plan, layout, rows.where(stays), [part.shard for part in written], skipped)
        with store.writing(settings.data.uri, "data.root"):
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
    kept = {manifest.class_names[number]: split for split, names in manifest.splits.items() for number in names}
    # Earlier code read names in archives otherwise.
    return {unicodedata.normalize("NFC", meant(name)): split for name, split in kept.items()} | kept


def _chosen(plan: Plan, rows: Rows, source: Source) -> tuple[np.ndarray, dict[int, Skip], list[Skip]]:
    """Which rows stay (bool [N]), the duplicates by their row, and the classes that are too small.

    No image is left out for one of a class that does not stay: classes that are small whatever others hold go first,
    and duplicates are looked for again without every class that goes.
    """
    of_class = range(len(rows.names)) if source.keep_duplicates else rows.digests
    images = set(zip(rows.classes.tolist(), of_class, strict=True))
    counts, small = np.bincount([number for number, _ in images], minlength=len(plan.classes)), dict[int, int]()
    while True:
        small |= {n: int(counts[n]) for n in np.flatnonzero((counts > 0) & (counts < source.min_images)).tolist()}
        stays = ~np.isin(rows.classes, list(small))
        duplicates = _duplicates(plan, rows, stays)
        if not source.keep_duplicates:
            stays[list(duplicates)] = False
        counts = np.bincount(rows.classes[stays], minlength=len(plan.classes))
        if not ((counts > 0) & (counts < source.min_images)).any():
            left = [small_class(plan.classes[n], count, source.min_images) for n, count in sorted(small.items())]
            return stays, duplicates, left


def _duplicates(plan: Plan, rows: Rows, stays: np.ndarray) -> dict[int, Skip]:
    """Images whose content came before, by their row, those that ``stays`` says first: each tells what it repeats."""
    first: dict[bytes, int] = {}
    found = {}
    numbers = rows.classes.tolist()
    for row in np.argsort(~stays, kind="stable").tolist():
        digest = rows.digests[row]
        original = first.setdefault(digest, row)
        if original != row:
            number, owner = numbers[row], numbers[original]
            reason = "duplicate_in_class" if owner == number else "duplicate_across_classes"
            detail = f"is {rows.names[original]} of class {plan.classes[owner]}"
            found[row] = Skip(rows.names[row], plan.classes[number], reason, detail)
    return found


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


def _rewrite(written: list[Written], stays: np.ndarray, layout: Layout, target: Target, progress: bool) -> None:
    """Replace the shards that hold images to leave out by shards without them; ``stays``: bool, of every row."""
    ends = np.cumsum([len(part.rows.names) for part in written])
    of_shards = np.split(stays, ends[:-1])
    changed = [position for position, mask in enumerate(of_shards) if not mask.all()]
    if not changed:
        return
    work = [{"work": pickle.dumps((written[position], of_shards[position]))} for position in changed]
    where: dict[str, Any] = {"layout": layout, "place": target.place, "current": target.current}
    done = _dataset(work, progress).map_batches(partial(rewrite, **where), batch_size=1)
    for position, result in zip(changed, done.iter_rows(), strict=True):
        written[position] = _result(result)


def _dataset(items: list[dict[str, Any]], progress: bool) -> ray.data.Dataset:
    """One block an item, in order."""
    dataset = one_block_each(items)
    dataset.context.execution_options.preserve_order = True
    # Of two cores it would keep half a one for the writers, and so one of them idle while there is nothing to write.
    dataset.context.op_resource_reservation_enabled = False
    dataset.context.target_max_block_size = 1  # a block ends with every chunk: shards are made of whole numbers of them
    dataset.context.enable_progress_bars = progress and sys.stdout.isatty()
    dataset.context.enable_rich_progress_bars, dataset.context.use_ray_tqdm = True, False
    return dataset


def _held(skipped: list[Skip]) -> list[Skip]:
    """What speaks against the input."""
    return [skip for skip in skipped if skip.reason not in HARMLESS]


def _refuse_many(skipped: list[Skip], images: int, settings: IngestConfig) -> None:
    held = _held(skipped)
    total = images + sum(not skip.reason.startswith("duplicate") for skip in held)
    if len(held) > settings.max_skipped_fraction * total:
        raise PipelineError(
            f"{len(held):,} of {total:,} files cannot be used, more than max_skipped_fraction="
            f"{settings.max_skipped_fraction:g}{_examples(held)}"
        )


def _examples(skipped: list[Skip]) -> str:
    if not skipped:
        return ""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in _counts(skipped).items())
    return f": {counts}; the first is {skipped[0].file} ({skipped[0].detail or skipped[0].reason})"


def _counts(skipped: list[Skip]) -> dict[str, int]:
    return dict(sorted(Counter(skip.reason for skip in skipped).items()))


def _manifest(
    settings: IngestConfig, plan: Plan, layout: Layout, rows: Rows, written: list[ShardInfo | None], skipped: list[Skip]
) -> Manifest:
    sums = ClassSums.of(len(plan.classes), rows.classes, rows.totals, rows.squares)
    present = {name for name, count in zip(plan.classes, sums.counts, strict=True) if count}
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
    shards = [shard for shard in written if shard]
    return make_manifest(
        settings.data.name, layout.shape, layout.encoding, plan.classes, sums, splits, shards, plan.rotations,
        plan.source, _counts(skipped),
    )  # fmt: skip


def _skipped_file(skipped: list[Skip], kept: list[Skip]) -> bytes:
    def listed(skips: list[Skip]) -> list[dict[str, str]]:
        return [{"file": s.file, "class": s.class_name, "reason": s.reason, "detail": s.detail} for s in skips]

    left_out = {"left_out": _counts(skipped), "files": listed(skipped)}
    stayed = {"kept": _counts(kept), "kept_files": listed(kept)}
    return (json.dumps({**left_out, **stayed}, indent=1) + "\n").encode()


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
