"""A photograph's way at 224x224: files that are decoded in the stream, and a step on features made once."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from docs.studies.benchmark import made
from docs.studies.benchmark.apart import Apart, Together
from docs.studies.benchmark.rows import Bench, Finding, ratio, row
from docs.studies.benchmark.runs import trained
from docs.studies.benchmark.stream import CONSUMERS, Streamed
from docs.studies.benchmark.timing import Sides, interleaved
from pipeline.config import compose
from pipeline.data.features import Network
from pipeline.data.ingest import ingest
from pipeline.data.write import Target
from pipeline.evaluation.embed_dataset import Embedding, embed_dataset
from pipeline.nets import build_backbone

SHAPE: made.Shape = (3, 224, 224)
STORED = (500, 375)  # width and height of the files
CLASSES, IMAGES = (12, 4, 4), 20  # of the splits; files of a class
EPISODE = 80  # images of an episode of five ways, one shot and fifteen queries
FEATURES = 1280  # as EfficientNet-Lite0 makes
REPETITIONS = 3  # at most, of a run


def draw(folder: Path) -> dict[str, list[str]]:
    """JPEG files in class folders, and the classes of every split: noise in two scales, that compresses about as
    photographs do."""
    generator = np.random.default_rng(0)
    names = [f"class{number:02d}" for number in range(sum(CLASSES))]
    for name in names:
        (folder / name).mkdir(parents=True)
        for image in range(IMAGES):
            (folder / name / f"{image:02d}.jpg").write_bytes(_photograph(generator))
    parts = np.split(np.array(names), np.cumsum(CLASSES)[:-1])
    return {split: part.tolist() for split, part in zip(("train", "val", "test"), parts, strict=True)}


def _photograph(generator: np.random.Generator) -> bytes:
    coarse = generator.integers(0, 240, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(STORED, Image.Resampling.BICUBIC))
    noisy = np.minimum(smooth.astype(np.int64) + generator.integers(0, 16, smooth.shape), 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(noisy).save(content, "jpeg", quality=90)
    return content.getvalue()


def encoded(folder: Path) -> tuple[str, list[str]]:
    """A dataset that keeps the files as they are, and the files themselves."""
    uri, files, splits = folder / "datasets" / "drawn_photographs", folder / "photographs", folder / "photographs.json"
    if not splits.exists():
        shutil.rmtree(files, ignore_errors=True)
        splits.write_text(json.dumps(draw(files)))
    if not uri.exists():
        place = [f"data.root={uri.parent}", f"data.name={uri.name}", f"data.source.path={files}"]
        form = [f"data.source.shape={list(SHAPE)}", "data.source.encoding=encoded", f"data.source.splits={splits}"]
        ingest(compose("ingest", ["data=folder", *place, *form]), progress=False)
    return str(uri), sorted(map(str, files.rglob("*.jpg")))


def opened(path: str) -> np.ndarray:
    """Open a file, cut its central square, resize it, make an array of it: uint8 [3, 224, 224]."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize(SHAPE[1:], Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def pillow(files: list[str], images: int) -> Iterator[float]:
    """Seconds of a plain loop over so many images."""
    buffer, turn = np.empty((EPISODE, *SHAPE), dtype=np.uint8), 0
    while True:
        began = time.perf_counter()
        for _ in range(images):
            buffer[turn % EPISODE] = opened(files[turn % len(files)])
            turn += 1
        yield time.perf_counter() - began


@row("photographs", needs_ray=True)
def stream_encoded(bench: Bench) -> Iterator[Finding]:
    """Images a second of the stream at 224x224, stored as files, against plain Pillow on as many cores."""
    uri, files = encoded(bench.folder)
    steps = bench.count(80, 2)  # so many that the stream's beginning and end do not count
    images = steps * EPISODE
    with (
        Streamed(uri, steps, tasks=1) as streamed,
        Apart(pillow, files, images) as first,
        Apart(pillow, files, images) as second,
    ):
        loops = Together([first, second])
        names = f"Ray Data, {CONSUMERS} consumers", f"Pillow, {CONSUMERS} processes"
        sides: Sides = {
            names[0]: lambda: EPISODE * streamed.rate(),
            names[1]: lambda: CONSUMERS * images / loops(),
        }
        found = interleaved(sides, bench.repetitions)
    yield ratio(
        f"images of the stream, data.source.encoding=encoded, {STORED[0]}x{STORED[1]} JPEG to 224x224, against opening "
        "and resizing them with Pillow on as many cores", found, names, "images/s",
        note="the stream draws episodes and makes batches of them; Pillow's loop takes one file after the other",
    )  # fmt: skip


@row("photographs", needs_ray=True)
def features_wait(bench: Bench) -> Iterator[Finding]:
    """Share of a training step that waits for data, of a head on features of a frozen network."""
    uri = _features(bench.folder)
    waits, sides = [], {"a step": []}  # type: ignore[var-annotated]
    steps = bench.count(20_000, 240)
    head = ["data=features", "backbone=features", "method=simple_shot", f"checkpoint.every={steps}"]
    for _ in range(min(REPETITIONS, bench.repetitions)):
        run = trained(bench, uri, 1, steps, *head)
        waits.append(100 * run.wait_share)
        sides["a step"].append(1e3 * run.seconds)
    yield Finding(
        f"waiting for data, share of a training step on {FEATURES:,} features of a frozen network (simple_shot, 128 "
        "images a step, one worker)", waits, "%", most=5, sides=sides, measure="ms",
    )  # fmt: skip


def _features(folder: Path) -> str:
    """The path of a dataset of features, by a network that costs little: a step cannot tell whose they are."""
    uri = folder / "datasets" / "frozen_features"
    if not uri.exists():
        images = made.dataset(folder, made.Pixels("random_28_few", made.OMNIGLOT, (64, 16, 20), 100))
        backbone, given = {"name": "mlp", "widths": [FEATURES]}, {"shape": list(made.OMNIGLOT), "scaling": "unit"}
        torch.manual_seed(0)
        network = Network(backbone, given, dict(build_backbone(backbone, made.OMNIGLOT).state_dict()))
        how = Embedding.of(images, network, None, 2**26, gpu=False)
        target = Target(str(uri), overwrite=True, resume=True)
        embed_dataset(how, target, uri.name, {"kind": "features", "dataset": images}, say=lambda line: None)
    return str(uri)
