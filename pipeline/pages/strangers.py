"""Strangers in a dataset: calibration on its validation classes, and what it is worth on classes of another split."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import nn

from pipeline.config import Config
from pipeline.data.dataset import ClassTable, Dataset, class_table, open_dataset
from pipeline.data.sources.base import Shape
from pipeline.errors import PipelineError
from pipeline.evaluation.embedded import given_embeddings, possible
from pipeline.evaluation.episodic import evaluating
from pipeline.evaluation.model import Built, Model
from pipeline.evaluation.spread import EmbeddedSplits, awaited, fetched
from pipeline.inference import calibrating
from pipeline.inference.background import CLASSES, IMAGES, Background, has_background, survey
from pipeline.inference.calibration import REPORTED, Calibration, CalibrationPoint
from pipeline.inference.rates import auroc_of, measure_rates, oscr, share_of
from pipeline.methods.base import Method
from pipeline.nets.preprocess import Preprocess

ASKED = 30_000  # images that the episodes of a calibration show, more or less
WAYS, SHOTS, QUERIES = (5, 20, 50), (1, 2, 5), 2000  # of a report
FEWEST_IMAGES = 5  # of a training class, whose mean is a part of the background
MOST = 20_000  # of a split that are embedded for it: the first of every class


@contextmanager
def asking(
    method: Method,
    preprocess: Preprocess,
    dataset: Dataset,
    split: str,
    once: EmbeddedSplits | None = None,
    most: int | None = None,
) -> Iterator[calibrating.Asking]:
    """Within: the classes of a split; by ``once``, where it can be, as the backbone sees ``most`` of their images."""
    embeddings = None if once is None else once.of(dataset.uri, split, ASKED, most)
    with evaluating(method):
        if embeddings is not None:
            with given_embeddings(method):
                yield calibrating.Asking(method, nn.Identity(), embeddings.of_class, embeddings.table.counts)
            return
        table = class_table(dataset.manifest, split)
        yield calibrating.Asking(method, preprocess, _images(dataset, table), table.counts)


def calibrate_run(
    method: Method, preprocess: Preprocess, dataset: Dataset, trained: Config, once: EmbeddedSplits | None = None
) -> Calibration | None:
    """Calibrate on the validation classes of a configuration, with its training classes as background.

    ``once`` computes, on the cluster, what the method's backbone makes of the images.
    """
    how = trained["validation"]
    table = class_table(dataset.manifest, how["split"])
    background = background_of(method, preprocess, dataset, trained["train"]["split"], table, how["seed"], once)
    with asking(method, preprocess, dataset, how["split"], once, MOST) as ask:
        if once is None or ask.preprocess is not preprocess:  # all images are embedded
            return calibrating.calibrate(*ask, seed=how["seed"], split=how["split"], background=background)
    points = calibrating.grid_of(table.counts, method.fixed_way)  # each is a task of its own, which takes images
    pieces = once.spread(_ask, points, dataset.uri, once.shape, how["split"], how["seed"], background)
    for done in awaited(pieces):
        print(f"{len(done)} of {len(points)} questions of the calibration asked", flush=True)
    asked: list[calibrating.Answered] = fetched(pieces)
    return calibrating.conclude(asked, calibrating.TARGET, how["seed"], how["split"], background)


def doubts(calibration: Calibration, dataset: Dataset, trained: Config) -> list[str]:
    """What is to be said of thresholds that are less than a promise, in a line each."""
    found, how = [], trained["validation"]["split"]
    classes, training = (class_table(dataset.manifest, split) for split in (how, trained["train"]["split"]))
    if trained["steps"] and np.isin(classes.ids, training.ids).any():
        found.append(
            f"'unknown' is calibrated on classes of validation.split={how} that were trained on: of new ones more "
            "strangers pass"
        )
    open_to = [rate.passed.high for point in calibration.points for rate in point.rates
               if rate.asked == calibration.target and not rate.borne_out]  # fmt: skip
    if open_to:
        more = ""
        if not trained["steps"] and how == "val":
            more = "; a network that trains on nothing can use the training classes too: validation.split=train+val"
        found.append(
            f"{len(classes)} validation classes are too few to promise that {100 * calibration.target:g} % of "
            f"strangers pass: by their 95 % intervals it may be up to {100 * max(open_to):.0f} %{more}"
        )
    return found


def _ask(
    built: Built, point: tuple[int, int], uri: str, shape: Shape, split: str, seed: int, background: Background | None
) -> calibrating.Answered:
    with asking(built.method, built.preprocess, open_dataset(uri, shape), split) as ask:
        return calibrating.ask_strangers(ask, *point, calibrating.QUERIES, seed, background)


def background_of(
    method: Method,
    preprocess: Preprocess,
    dataset: Dataset,
    training: str,
    asked: ClassTable,
    seed: int,
    once: EmbeddedSplits | None = None,
) -> Background | None:
    """Of the training classes that are not ``asked`` about themselves: as many images as these have, or few of each."""
    table = class_table(dataset.manifest, training)
    apart = np.flatnonzero(~np.isin(table.ids, asked.ids))
    drawn = np.sort(np.random.default_rng([seed, 1]).permutation(apart)[:CLASSES])
    each = max(FEWEST_IMAGES, min(IMAGES, int(asked.counts.sum()) // max(1, len(drawn))))
    counts = np.minimum(table.counts[drawn], each)
    few = replace(table, ids=table.ids[drawn], starts=table.starts[drawn], counts=counts, names=())
    if len(few) < 2 or not has_background(method):
        return None
    with evaluating(method):
        if once is None or not possible(method, few, int(few.counts.sum()) + 1):
            return survey(method, preprocess, _images(dataset, few), few.counts, seed)
        embeddings = once.few(dataset.uri, few)
        with given_embeddings(method):
            return survey(method, nn.Identity(), embeddings.of_class, few.counts, seed)


def _images(dataset: Dataset, table: ClassTable) -> calibrating.ClassImages:
    turns = np.asarray(dataset.manifest.rotations)[table.ids % len(dataset.manifest.rotations)] // 90
    return calibrating.class_images(dataset.gather, table.starts, turns)


def measure(
    model: Model,
    trained: Config,
    dataset: str,
    split: str,
    strangers: str | None,
    seed: int,
    once: EmbeddedSplits | None = None,
) -> list[dict[str, Any]]:
    """What a model's calibration is worth on the classes of another split, or of another dataset.

    Args:
        trained: the configuration that the model was trained with, on whose validation classes it is calibrated.
        strangers: a split whose images are strangers too, each of a class of its own; None: only the classes that an
            episode does not enrol.
        once: of this model, to embed every image once.

    Returns:
        A row for each number of classes and images: AUROC, OSCR and the share of enrolled that is refused, with
        thresholds set on other classes of this split (``rates``) and with those of the calibration (``promised``).
    """
    method, preprocess = model.build()
    own = Dataset(str(model.dataset), verify=False)
    calibration = calibrate_run(method, preprocess, own, trained, once)
    if calibration is None:
        raise PipelineError(f"{model.label}: split {trained['validation']['split']!r} is too small to calibrate on")
    data = Dataset(dataset, verify=False)
    ids, together = class_table(data.manifest, split).ids, split
    if strangers is not None:
        if np.intersect1d(ids, class_table(data.manifest, strangers).ids).size:
            raise PipelineError(
                f"strangers={strangers} has classes of split={split}, which are enrolled: give another split"
            )
        together = f"{split}+{strangers}"
    table, classes = class_table(data.manifest, together), len(ids)
    apart = [(number, image) for number in range(classes, len(table)) for image in range(table.counts[number])]
    passers, rows = np.asarray(apart) if apart else None, []
    with asking(method, preprocess, data, together, once) as ask:
        enrolled = ask._replace(counts=ask.counts[:classes])
        for shot in SHOTS:
            for way in calibrating.ways_of(WAYS, int((enrolled.counts > shot).sum()), method.fixed_way):
                point = calibration.nearest(way, shot)
                found = calibrating.ask_strangers(
                    enrolled, way, shot, QUERIES, seed, calibration.background, point.temperature, passers
                )
                rows.append({"run": model.label, **_figures(found, point)})
    if not rows:
        raise PipelineError(f"split={split}: it has too few classes for strangers beside enrolled ones")
    return rows


def _figures(found: calibrating.Answered, point: CalibrationPoint) -> dict[str, Any]:
    enrolled, strangers = found.scores[point.score]
    return {
        "way": found.way,
        "shot": found.shot,
        "calibrated": {
            "way": point.way,
            "shot": point.shot,
            "strangers": point.stranger_images,
            "classes": point.stranger_classes,
        },
        "score": point.score,
        "temperature": point.temperature,
        "unreliable": {"before": found.unreliable[0], "after": found.unreliable[1]},
        "accuracy": float(found.right.mean()),
        "auroc": vars(auroc_of(enrolled, strangers)),
        "oscr": oscr(enrolled.scores, found.right, strangers.scores),
        "scores": {name: found.auroc(name) for name in found.scores},
        "strangers": strangers.distinct,
        "rates": [asdict(rate) for rate in measure_rates(enrolled, strangers, REPORTED)],
        "promised": [
            {
                "asked": asked,
                "threshold": rate.threshold,
                "validated": vars(rate.passed),
                "borne_out": rate.borne_out,
                "passed": vars(share_of(strangers.scores >= rate.threshold, strangers)),
                "refused": vars(share_of(enrolled.scores < rate.threshold, enrolled)),
            }
            for asked in REPORTED
            if asked >= point.least_share
            for rate in [point.rate(asked)]
        ],
    }
