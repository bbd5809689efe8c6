"""Strangers in a dataset: calibration on its validation classes, and what it is worth on classes of another split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pipeline.data.dataset import ClassTable, Dataset, class_table
from pipeline.evaluation.embedded import embed_part, given_embeddings, possible
from pipeline.evaluation.episodic import evaluating
from pipeline.inference.background import Background, survey
from pipeline.inference.calibrating import ClassImages, calibrate, class_images
from pipeline.inference.calibration import Calibration
from pipeline.methods.base import Method
from pipeline.nets.preprocess import Preprocess

ASKED = 30_000  # images that the episodes of a calibration show, more or less


@dataclass(frozen=True)
class Asking:
    """A method and the images of a split's classes, in the form that it takes them."""

    method: Method
    preprocess: nn.Module
    images: ClassImages
    counts: np.ndarray  # [classes]


@contextmanager
def asking(method: Method, preprocess: Preprocess, dataset: Dataset, table: ClassTable) -> Iterator[Asking]:
    """Within: the classes of ``table``; where it can be, every image goes through the backbone once."""
    with evaluating(method):
        if not possible(method, table, ASKED):
            turns = np.asarray(dataset.manifest.rotations)[table.ids % len(dataset.manifest.rotations)] // 90
            images = class_images(dataset.gather, table.starts, turns)
            yield Asking(method, preprocess, images, table.counts)
            return
        total = range(int(table.counts.sum()))
        values = embed_part(method, preprocess, dataset, table, total, torch.device("cpu"))
        first = np.cumsum(table.counts) - table.counts
        with given_embeddings(method):
            yield Asking(
                method, nn.Identity(), class_images(lambda rows: values[rows][..., None, None], first), table.counts
            )


def calibrate_on(
    method: Method, preprocess: Preprocess, dataset: Dataset, split: str, training: str, seed: int
) -> Calibration | None:
    """Calibrate on the classes of ``split``, with those of the split ``training`` as background."""
    table = class_table(dataset.manifest, split)
    background = background_of(method, preprocess, dataset, training, table, seed)
    with asking(method, preprocess, dataset, table) as ask:
        return calibrate(
            ask.method, ask.preprocess, ask.images, ask.counts, seed=seed, split=split, background=background
        )


def background_of(
    method: Method, preprocess: Preprocess, dataset: Dataset, training: str, asked: ClassTable, seed: int
) -> Background | None:
    """Of the training classes that are not ``asked`` about themselves."""
    table = class_table(dataset.manifest, training)
    apart = ~np.isin(table.ids, asked.ids)
    turns = np.asarray(dataset.manifest.rotations)[table.ids % len(dataset.manifest.rotations)] // 90
    images = class_images(dataset.gather, table.starts[apart], turns[apart])
    with evaluating(method):
        return survey(method, preprocess, images, table.counts[apart], seed)
