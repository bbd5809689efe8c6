"""Ingest of many small image files, against a loop that opens one after the other."""

from __future__ import annotations

import io
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from docs.studies.benchmark.apart import Apart
from docs.studies.benchmark.rows import Bench, Finding, ratio, row
from docs.studies.benchmark.timing import Sides, interleaved, seconds
from pipeline.config import compose
from pipeline.data.ingest import ingest
from pipeline.data.sources import splits

PARTS = {"train": 500, "test": 100}  # images a class, as CIFAR-100


def pillow(archive: str, target: str) -> Iterator[float]:
    """Seconds of the plain loop: every image of the archive, in one array, which is saved."""
    while True:
        began = time.perf_counter()
        with zipfile.ZipFile(archive) as files:
            names = [name for name in files.namelist() if name.endswith(".png")]
            pixels = np.empty((len(names), 3, 32, 32), dtype=np.uint8)
            for number, name in enumerate(names):
                image = Image.open(io.BytesIO(files.read(name))).convert("RGB")
                pixels[number] = np.asarray(image).transpose(2, 0, 1)
        np.save(target, pixels)
        yield time.perf_counter() - began


def draw(archive: Path, bench: Bench) -> None:
    """PNGs in CIFAR-100's folders: noise in two scales, which compresses about as photographs do."""
    generator = np.random.default_rng(0)
    chosen = splits.published("cifar_fs")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as files:
        for name in sorted(name for names in chosen.values() for name in names):
            for part, images in PARTS.items():
                for number in range(bench.count(images, 2)):
                    coarse = generator.integers(0, 240, (8, 8, 3), dtype=np.uint8)
                    image = Image.fromarray(coarse).resize((32, 32), Image.Resampling.BILINEAR)
                    noisy = np.asarray(image) + generator.integers(0, 16, (32, 32, 3), dtype=np.uint8)
                    content = io.BytesIO()
                    Image.fromarray(noisy).save(content, "png")
                    files.writestr(f"{part}/{name}/{number:05d}.png", content.getvalue())


@row("ingest", needs_ray=True)
def ingest_png(bench: Bench) -> Iterator[Finding]:
    """Ingest of CIFAR-100's 60,000 PNGs on all cores against a plain Pillow loop on one."""
    if bench.images is None:
        archive = bench.folder / "images.zip"
        if not archive.exists():
            draw(archive, bench)
        kind = "drawn PNGs of CIFAR-100's shape and number"
    else:
        archive, kind = Path(bench.images), "CIFAR-100's PNGs"
        archive = archive / "cifar100-png.zip" if archive.is_dir() else archive
    root = bench.folder / "ingested"
    given = ["data=cifar_fs", f"data.root={root}", f"data.source.path={archive}"]

    def ingested() -> float:
        shutil.rmtree(root, ignore_errors=True)
        return seconds(lambda: ingest(compose("ingest", given), progress=False))

    with Apart(pillow, str(archive), str(bench.folder / "pillow.npy")) as loop:
        sides: Sides = {"Pillow loop, one core": loop, "jobs.ingest, all cores": ingested}
        found = interleaved(sides, min(3, bench.repetitions))
    names = list(sides)
    yield ratio(
        f"ingest of {kind}, against a plain Pillow loop on one core", found, (names[0], names[1]), "s", least=1.8,
        note="Ray runs already; the loop keeps pixels alone, without classes, duplicates, checksums or statistics",
    )  # fmt: skip
