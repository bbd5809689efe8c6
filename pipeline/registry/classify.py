"""Classification from the shell: a folder of labelled images, a folder of queries, a table of answers."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import store
from pipeline.config import Config, Section, validate
from pipeline.data.sources.tree import shown
from pipeline.errors import PipelineError
from pipeline.inference import Answers, CalibrationPoint, Enrolment, FewShotClassifier
from pipeline.inference.folders import Pictures, read_queries, read_support
from pipeline.inference.rates import Share
from pipeline.inference.scores import MEANING
from pipeline.registry.tracking_config import TrackingConfig
from pipeline.registry.versions import pull
from pipeline.tables import printable, text_table


class Unknown(Section):
    share: Annotated[float, Field(gt=0, lt=1)] | None = Field(alias="pass")


class ClassifyConfig(Section):
    """Keys of ``conf/classify.yaml``."""

    model: str
    support: str | None
    queries: str | list[str] | None
    enrolment: str | None
    save_enrolment: str | None
    keep_images: bool
    threshold: str | float | int | None
    unknown: Unknown
    top_k: Annotated[int, Field(ge=1)]
    invert: bool
    device: str
    tracking: TrackingConfig


def classify(raw: Config) -> dict[str, Any]:
    """Enrol (or load, or extend) classes, answer queries, print them, and return the summary of ``--json``."""
    config = validate(ClassifyConfig, raw)
    _check(config)
    classifier = load_classifier(config.model, config.tracking.model_dump(), config.device)
    enrolment, skipped = _enrolment(config, classifier)
    if not config.keep_images:  # those of the file neither
        enrolment = replace(enrolment, images=None, positions=None)
    if config.save_enrolment:
        store.write_bytes(config.save_enrolment, enrolment.to_bytes())
    what = enrolment.note if config.support else f"{enrolment.way} classes from {config.enrolment}"
    summary: dict[str, Any] = {
        "model": config.model,
        "classes": enrolment.classes,
        "enrolment": what,
        "threshold": classifier.threshold_for(enrolment, config.threshold, config.unknown.share),
        "saved": config.save_enrolment,
    }
    print(f"{what}{f', saved to {config.save_enrolment}' if config.save_enrolment else ''}")
    if config.queries is not None:
        pictures = read_queries(config.queries, classifier.shape, config.invert, classifier.max_pixels)
        skipped += pictures.skipped
        answers = classifier.classify(enrolment, pictures.images, config.threshold, config.unknown.share)
        summary["answers"] = _rows(pictures, answers, config.top_k)
        _show(summary["answers"], config.top_k, "(unknown)" if "unknown" in enrolment.classes else "unknown")
        print(_conclusion(classifier, enrolment, answers, config))
    summary["skipped"] = [{"file": shown(str(file)), "reason": reason} for file, reason in skipped]
    if skipped:
        print(
            f"{len(skipped)} file{'' if len(skipped) == 1 else 's'} could not be read: "
            + "; ".join(f"{printable(shown(str(file)))} ({why})" for file, why in skipped)
        )
    return summary


def load_classifier(model: str, tracking: dict[str, Any], device: str = "cpu") -> FewShotClassifier:
    """From the registry (``models:/...``), or from a folder of ``model.json`` and ``weights.safetensors``."""
    _check_device(device)
    if model.startswith("models:"):
        return pull(model, tracking, device)
    if not Path(model).is_dir():
        raise PipelineError(f"model={model}: give models:/NAME@ALIAS, models:/NAME/VERSION or a folder")
    return FewShotClassifier.load(model, device)


def _check(config: ClassifyConfig) -> None:
    if config.support is None and config.enrolment is None:
        raise PipelineError("give support=FOLDER of labelled images, or enrolment=FILE of classes enrolled before")
    if config.queries is None and config.save_enrolment is None:
        raise PipelineError("give queries=FOLDER to be answered, or save_enrolment=FILE to keep the classes")
    if config.save_enrolment is not None:
        store.check_output(config.save_enrolment, "save_enrolment")
    text = config.threshold
    if isinstance(text, str) and text not in ("auto", "none"):
        raise PipelineError(f"threshold={text!r}: give auto, none or a number")


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise PipelineError(f"device={name}: torch cannot use it here; give device=cpu") from error


def _enrolment(config: ClassifyConfig, classifier: FewShotClassifier) -> tuple[Enrolment, list[tuple[Path, str]]]:
    """What is enrolled: the file's classes, the folder's, or the file's extended by the folder's."""
    if config.support is None:
        return _read(str(config.enrolment)), []
    pictures, labels = read_support(config.support, classifier.shape, config.invert, classifier.max_pixels)
    _compare_brightness(classifier, pictures.images)
    if config.enrolment is None:
        return classifier.enrol(pictures.images, labels), pictures.skipped
    return classifier.extend(_read(config.enrolment), pictures.images, labels), pictures.skipped


def _read(place: str) -> Enrolment:
    return Enrolment.from_bytes(store.read_bytes(place), place)


def _compare_brightness(classifier: FewShotClassifier, images: np.ndarray) -> None:
    """Say so when the images look like the negative of what the model was trained on."""
    mean = classifier.spec["input"].get("mean")
    if not mean:
        return
    trained, given = float(np.mean(mean)), float(images.mean() / 255)
    if abs(given - trained) > abs(1 - given - trained) + 0.2:
        print(
            f"note: these images have a mean brightness of {given:.2f}, the training images {trained:.2f}; if they are "
            "dark ink on bright paper and the model knows bright ink on dark, or the reverse: invert=true"
        )


def _rows(pictures: Pictures, answers: Answers, top_k: int) -> list[dict[str, Any]]:
    labels, probabilities = answers.top(top_k)
    return [
        {
            "file": shown(str(file)),
            "label": answers.labels[i] if answers.known[i] else None,
            "nearest": answers.labels[i],
            "known": bool(answers.known[i]),
            "probability": float(answers.probabilities[i].max()),
            "score": float(answers.scores[i]),
            "top": [{"label": a, "probability": float(p)} for a, p in zip(labels[i], probabilities[i], strict=True)],
        }
        for i, file in enumerate(pictures.files)
    ]


def _show(rows: Sequence[dict[str, Any]], top_k: int, stranger: str) -> None:
    header = ["file", "answer", "probability", "score", "nearest" if top_k == 1 else f"nearest {top_k}"]
    files = [os.path.abspath(row["file"]) for row in rows]  # relative and absolute ones have no path in common
    shared = os.path.commonpath([os.path.dirname(file) for file in files]) if rows else ""
    cells = [
        [
            os.path.relpath(file, shared),
            str(row["label"]) if row["known"] else stranger,
            f"{100 * row['probability']:.1f} %",
            f"{row['score']:.2f}",
            "  ".join(f"{entry['label']} {100 * entry['probability']:.0f} %" for entry in row["top"])
            if top_k > 1
            else str(row["nearest"]),
        ]
        for file, row in zip(files, rows, strict=True)
    ]
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        print(text_table(header, cells))
        return
    table = Table(box=SIMPLE_HEAD, header_style="bold")
    for name in header:
        table.add_column(name, overflow="fold", justify="right" if name in ("probability", "score") else "left")
    for row, line in zip(rows, cells, strict=True):  # as text: names are no markup, whatever brackets they have
        table.add_row(*map(Text, map(printable, line)), style=None if row["known"] else "yellow")
    console.print(table)


def _conclusion(classifier: FewShotClassifier, enrolment: Enrolment, answers: Answers, config: ClassifyConfig) -> str:
    unknown = int((~answers.known).sum())
    counted = f"{len(answers)} image{'' if len(answers) == 1 else 's'}, {unknown} unknown"
    if answers.threshold is None:
        why = "the model has no calibration for them" if config.threshold == "auto" else "threshold=none"
        return f"{counted} (every image gets a class: {why})"
    point = classifier.point_for(enrolment)
    if config.threshold != "auto" or point is None or classifier.calibration is None:
        return f"{counted} (threshold {answers.threshold:.4g})"
    promise = _promise(point, enrolment, classifier.calibration.target, config.unknown.share)
    return f"{counted} (threshold {answers.threshold:.4g}, {promise})"


def _promise(point: CalibrationPoint, enrolment: Enrolment, target: float, share: float | None) -> str:
    """What the threshold did in validation, how sure that is, and where the enrolment is beyond it."""
    where = f"calibrated for {point.way} classes of {point.shot} images"
    if not point.rates:  # of an earlier version
        passed, refused = 100 * point.false_acceptance, 100 * point.false_rejection
        return f"{where}: {passed:.1f} % of strangers pass, {refused:.1f} % of enrolled fail"
    rate = next(r for r in point.rates if r.asked == target) if share is None else point.rate(share)
    told = f"{where} by {MEANING[point.score]}: {_percent(rate.passed)} of strangers pass, {_percent(rate.refused)} "
    told += "of enrolled fail; 95 % intervals, from "
    told += f"{point.stranger_images:,} strangers of {point.stranger_classes} classes"
    if rate.asked < point.least_share:
        told += f", too few to tell a rate under {100 * point.least_share:.1f} %"
    if not rate.borne_out:
        told += f"; no promise: {point.stranger_classes} validation classes are too few for {100 * rate.asked:g} %, "
        told += f"of other strangers up to {100 * rate.passed.high:.1f} % may pass"
    if enrolment.way > 1.5 * point.way:
        told += f"; validation had too few classes to tell about {enrolment.way}, among which more strangers pass"
    return told


def _percent(share: Share) -> str:
    return f"{100 * share.value:.1f} % ({100 * share.low:.1f} to {100 * share.high:.1f})"
