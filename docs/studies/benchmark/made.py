"""Datasets, models and batches that are made to be measured: random pixels cost what photographs cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.batch import Episodes
from pipeline.data.dataset import Dataset, class_table
from pipeline.data.episodes import EpisodeSpec
from pipeline.data.planners import EpisodePlanner
from pipeline.data.write import write_dataset
from pipeline.methods.base import Method
from pipeline.model import build_model

Shape = tuple[int, int, int]

OMNIGLOT: Shape = (1, 28, 28)
MINI_IMAGENET: Shape = (3, 84, 84)


@dataclass(frozen=True)
class Pixels:
    """A dataset of random pixels."""

    name: str
    shape: Shape
    classes: tuple[int, int, int]  # of the splits train, val and test
    images: int  # a class
    rotations: tuple[int, ...] = (0,)


# As large as Omniglot with Vinyals' rotations; mini-ImageNet's classes with a sixth of the images.
SMALL = Pixels("random_28", OMNIGLOT, (1028, 172, 423), 20, (0, 90, 180, 270))
LARGE = Pixels("random_84", MINI_IMAGENET, (64, 16, 20), 100)


def dataset(folder: Path, pixels: Pixels) -> str:
    """The path of a dataset, which is made where it is missing."""
    uri = folder / "datasets" / pixels.name
    if not uri.exists():
        names = [f"class{number:04d}" for number in range(sum(pixels.classes))]
        ends = np.cumsum(pixels.classes)
        parts = np.split(np.array(names), ends[:-1])
        splits = {split: part.tolist() for split, part in zip(("train", "val", "test"), parts, strict=True)}
        write_dataset(str(uri), pixels.name, _classes(names, pixels), splits, pixels.rotations)
    return str(uri)


def _classes(names: list[str], pixels: Pixels) -> Iterator[tuple[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    for name in names:
        yield name, generator.integers(0, 256, (pixels.images, *pixels.shape), dtype=np.uint8)


def planner(uri: str, tasks: int, way: int = 5, shot: int = 1, query: int = 15) -> EpisodePlanner:
    table = class_table(Dataset(uri, verify=False).manifest, "train")
    return EpisodePlanner(table, EpisodeSpec(way, shot, query, tasks), seed=0)


def model(method: str, shape: Shape, way: int, shot: int = 1, **options: Any) -> Method:
    """A method with its defaults but for ``options``; those of the backbone are given as ``backbone={...}``."""
    backbone = {"name": "conv4", **options.pop("backbone", {})}
    torch.manual_seed(0)
    spec = {
        "method": {"name": method, **options},
        "backbone": backbone,
        "input": {"shape": list(shape), "scaling": "unit"},
        "way": way,
        "shot": shot,
        "classes": 64,
    }
    return build_model(spec)


def episodes(tasks: int, shape: Shape, way: int = 5, shot: int = 1, query: int = 15, seed: int = 0) -> Episodes:
    """Float images, as a method takes them: [tasks, way * shot, ...] and [tasks, way * query, ...]."""
    generator = torch.Generator().manual_seed(seed)
    sides: list[Tensor] = []
    for count in (shot, query):
        labels = torch.arange(way).repeat_interleave(count).expand(tasks, -1).contiguous()
        sides += [torch.rand(tasks, way * count, *shape, generator=generator), labels]
    support, support_labels, questions, answers = sides
    classes = torch.arange(way).expand(tasks, -1).contiguous()
    return Episodes(support, support_labels, questions, answers, classes, way)
