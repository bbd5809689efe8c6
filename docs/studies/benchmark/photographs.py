"""Photographs at 224x224: encoded images through the stream against Pillow, and training on features of theirs."""

from __future__ import annotations

import io
import os
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageOps

from docs.studies.benchmark import made
from docs.studies.benchmark.apart import Apart, Together
from docs.studies.benchmark.features import embedding
from docs.studies.benchmark.rows import Bench, Finding, ratio, row
from docs.studies.benchmark.runs import trained
from docs.studies.benchmark.stream import CONSUMERS, TASKS, Streamed
from docs.studies.benchmark.timing import Sides, interleaved
from docs.studies.benchmark.usage import private_bytes
from pipeline.data.augment import Augmentation
from pipeline.data.dataset import Dataset
from pipeline.data.write import DatasetWriter, Target
from pipeline.evaluation.embed_dataset import Embedder, embed_dataset

SIZE, TAKEN = (224, 224), (300, 225)  # stored for the network; as cameras and collections have them (width, height)
CLASSES, EACH = 24, 20
EPISODE = 5 * (1 + 15)  # images
MB = 2**20
INTERVAL = 0.2  # seconds between two looks at memory


def photographs(folder: Path) -> str:
    """The path of a dataset of drawn JPEGs, stored as they are: smooth in the large, noisy in the small."""
    uri = folder / "datasets" / "drawn_224"
    if not uri.exists():
        generator, names = np.random.default_rng(0), [f"class{number:02d}" for number in range(CLASSES)]
        with DatasetWriter(str(uri), "drawn_224", (3, *SIZE), "encoded") as writer:
            for name in names:
                writer.add(name, [_photograph(generator) for _ in range(EACH)])
            writer.finish({"train": names[:-10], "val": names[-10:-5], "test": names[-5:]})
    return str(uri)


def _photograph(generator: np.random.Generator) -> bytes:
    coarse = Image.fromarray(generator.integers(0, 240, (9, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(TAKEN, Image.Resampling.BICUBIC))
    content = io.BytesIO()
    Image.fromarray(smooth + generator.integers(0, 16, smooth.shape, dtype=np.uint8)).save(content, "jpeg", quality=90)
    return content.getvalue()


def opened(uri: str, images: int, clock: str) -> Iterator[float]:
    """Seconds a plain Pillow loop needs for so many images of the dataset: open, cut and resize, copy."""
    dataset = Dataset(uri, verify=False)
    files = [row.as_py() for view in dataset._views for row in view]
    out, measured = np.empty((EPISODE, 3, *SIZE), np.uint8), getattr(time, clock)
    while True:
        began = measured()
        for number in range(images):
            image = Image.open(io.BytesIO(files[number % len(files)])).convert("RGB")
            image = ImageOps.fit(image, SIZE, Image.Resampling.BILINEAR)
            out[number % EPISODE] = np.asarray(image).transpose(2, 0, 1)
        yield measured() - began


@row("stream", needs_ray=True)
def stream_encoded(bench: Bench) -> Iterator[Finding]:
    """Encoded photographs through the stream at 224x224 against a plain Pillow loop on the same cores."""
    uri, steps = photographs(bench.folder), bench.count(20, 2)
    images = steps * TASKS * EPISODE
    with (
        Streamed(uri, steps) as streamed,
        Apart(opened, uri, images, "perf_counter") as one,
        Apart(opened, uri, images, "perf_counter") as two,
        Apart(opened, uri, images, "process_time") as alone,
    ):
        loops = Together([one, two])
        sides: Sides = {
            "Ray Data, two consumers": lambda: EPISODE * streamed.rate(),
            "Pillow, two loops": lambda: CONSUMERS * images / loops(),
            "stream": lambda: streamed.cpu() / EPISODE,
            "Pillow": lambda: 1e3 * alone() / images,
        }
        found = interleaved(sides, bench.repetitions)
    names, what = list(sides), f"JPEGs of {TAKEN[0]}x{TAKEN[1]}, decoded in the stream to 224x224x3"
    rates, cpu = ({name: found[name] for name in part} for part in (names[:2], names[2:]))
    yield ratio(f"{what}, against plain Pillow loops on two cores", rates, (names[0], names[1]), "images/s")
    yield ratio(f"{what}: CPU an image, of all processes, against plain Pillow", cpu, ("stream", "Pillow"), "CPU ms")


@row("features", needs_ray=True)
def features_waiting(bench: Bench) -> Iterator[Finding]:
    """Share of a training step on features of a frozen network that waits for data."""
    uri = _features(bench)
    more = ["data=features", f"data.root={Path(uri).parent}", f"data.name={Path(uri).name}", "backbone=features",
            "method=prototypical", "method.learn_scale=true"]  # fmt: skip
    runs = [trained(bench, uri, 1, bench.count(3000, 60), *more) for _ in range(min(3, bench.repetitions))]
    yield Finding(
        "waiting for data, share of a training step on 1,600 features (prototypical, learned scale, 5-way 1-shot "
        "15-query, one worker)",
        [100 * run.wait_share for run in runs], "%", most=5,
        sides={"step": [1e3 * run.seconds for run in runs]}, measure="ms",
    )  # fmt: skip


def _features(bench: Bench) -> str:
    place = bench.folder / "datasets" / "features_waiting"
    if not place.exists():
        target = Target(str(place), resume=True)
        how = embedding(made.dataset(bench.folder, made.LARGE))
        embed_dataset(how, target, place.name, {"kind": "features"}, say=lambda line: None)
    return str(place)


@row("features", needs_ray=True)
def features_memory(bench: Bench) -> Iterator[Finding]:
    """Growth of the private memory of jobs.embed's actors from the first third of a run to its last."""
    how = embedding(made.dataset(bench.folder, made.LARGE))
    grown, sides = [], {"first third": [], "last third": []}  # type: ignore[var-annotated]
    views = max(0, bench.count(4, 0) - 1)
    how = replace(how, views=views, augmentation=Augmentation(flip=views > 0))
    for number in range(min(3, bench.repetitions)):
        place = bench.folder / "datasets" / f"features_memory_{number}"
        target = Target(str(place), overwrite=True, resume=True)
        with Watch(target.place) as watch:
            embed_dataset(how, target, place.name, {"kind": "features"}, say=lambda line: None)
        first, last = watch.thirds()
        grown.append(last - first)
        sides["first third"].append(first)
        sides["last third"].append(last)
    yield Finding(
        f"private memory of an actor of jobs.embed, last third of a run over {10_000 * (1 + views):,} images of 84x84 "
        "less its first third", grown, "MB", most=20, sides=sides, measure="MB",
    )  # fmt: skip


class Watch:
    """Private memory, over time, of the largest actor that embeds, from its first written shard on."""

    def __init__(self, place: str) -> None:
        self.seen: list[float] = []  # MB
        self._place, self._stop = place, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def thirds(self) -> tuple[float, float]:
        """Medians of the first third and of the last."""
        part = max(1, len(self.seen) // 3)
        return statistics.median(self.seen[:part]), statistics.median(self.seen[-part:])

    def _look(self) -> None:
        while not self._stop.wait(INTERVAL):
            if not os.path.isdir(self._place) or not any(f.startswith("part-") for f in os.listdir(self._place)):
                continue
            found = []
            for process in psutil.Process().children(recursive=True):
                try:
                    if Embedder.__name__ in " ".join(process.cmdline()):
                        found.append(private_bytes(process) / MB)
                except psutil.Error:
                    continue
            if found:
                self.seen.append(max(found))
