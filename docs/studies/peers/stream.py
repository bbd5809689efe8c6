"""Episodes from shards through Ray Data, against easyfsl's sampler and loader on PNG files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from docs.studies.benchmark import made
from docs.studies.benchmark.apart import Apart
from docs.studies.benchmark.rows import Bench, Finding, ratio, row
from docs.studies.benchmark.stream import STEPS, Streamed
from docs.studies.benchmark.timing import Sides, interleaved
from docs.studies.peers.peers import peer
from pipeline.data.sources.glyphs import draw_glyphs

CLASSES, DRAWINGS, SIDE = 200, 20, 105  # files as Omniglot's: black on white, one bit a pixel


def draw_files(folder: Path) -> Path:
    """One folder of PNG files a class, and the JSON file that easyfsl reads; drawn where they are missing."""
    specs = folder / "glyph_files" / "specs.json"
    if not specs.exists():
        roots = [specs.parent / f"class{number:03d}" for number in range(CLASSES)]
        for root, drawings in zip(roots, draw_glyphs(np.arange(CLASSES), DRAWINGS, SIDE), strict=True):
            root.mkdir(parents=True)
            for number, pixels in enumerate(drawings[:, 0]):
                Image.fromarray(255 - pixels).convert("1").save(root / f"{number:02d}.png")
        specs.write_text(json.dumps({"class_names": [r.name for r in roots], "class_roots": [str(r) for r in roots]}))
    return specs


def small(image: Image.Image) -> Tensor:
    """What its users write as transforms: 28x28, one channel, 0..1."""
    pixels = np.asarray(image.convert("L").resize((28, 28), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels.astype(np.float32) / 255).unsqueeze(0)


def easyfsl(specs: str, count: int) -> Iterator[float]:
    """Episodes a second of its sampler and PyTorch's loader with two workers."""
    Sampler.__init__ = lambda self, *_, **__: None  # type: ignore[method-assign]  # its argument is gone from torch
    dataset = peer("easyfsl.datasets").EasySet(specs_file=specs, transform=small)
    sampler = peer("easyfsl.samplers").TaskSampler(dataset, n_way=5, n_shot=1, n_query=15, n_tasks=10**9)
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=2, collate_fn=sampler.episodic_collate_fn,
        multiprocessing_context="fork",  # its default on Linux, but not in a process that was itself spawned
    )  # fmt: skip
    batches = iter(loader)
    for _ in range(8):
        next(batches)
    while True:
        began = time.perf_counter()
        for _ in range(count):
            next(batches)
        yield count / (time.perf_counter() - began)


@row("stream", needs_ray=True)
def stream_easyfsl(bench: Bench) -> Iterator[Finding]:
    """Episode stream against easyfsl's sampler and loader."""
    peer("easyfsl")
    uri, specs = made.dataset(bench.folder, made.SMALL), draw_files(bench.folder)
    with (
        Streamed(uri, bench.count(STEPS[made.SMALL], 20)) as streamed,
        Apart(easyfsl, str(specs), bench.count(400, 20)) as theirs,
    ):
        sides: Sides = {"Ray Data, two consumers": streamed.rate, "easyfsl, two workers": theirs}
        found = interleaved(sides, bench.repetitions)
    names = list(sides)
    yield ratio(
        "episode stream, Omniglot's size, 5-way 1-shot 15-query, against easyfsl's sampler and loader on PNG files",
        found, (names[0], names[1]), "episodes/s", least=120,
    )  # fmt: skip
