"""A registered model for phones and cameras: its network as ONNX, its head as numbers and a page of numpy.

What a method learns by gradients from the support cannot be written so; what it learns by class means can.
"""

import importlib.util
import json
import logging
import os
import runpy
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline import store
from pipeline.config import Config, Section, validate
from pipeline.data.dataset import Dataset
from pipeline.errors import PipelineError
from pipeline.files import file_sha256, write_atomic
from pipeline.inference import FewShotClassifier
from pipeline.inference.folders import read_queries
from pipeline.methods.head import ClassMeans, HeadMethod
from pipeline.nets.norm import looks_at_the_batch
from pipeline.registry.classify import load_classifier
from pipeline.registry.tracking_config import TrackingConfig

NETWORK, ABOUT, PAGE = "network.onnx", "model.json", "few_shot.py"
OPTIONAL = ("onnx", "onnxscript", "onnxruntime")
CHECKED, CLASSES = 40, 5  # images that both networks see, and how many classes are made of half of them
OPSET = 18


class ExportConfig(Section):
    """Keys of ``conf/export.yaml``."""

    model: str
    output: str
    images: str | list[str] | None
    tolerance: Annotated[float, Field(gt=0)]
    tracking: TrackingConfig


def export(raw: Config) -> dict[str, Any]:
    """Write the folder ``output``, whole or not at all, and return how far its answers are from the model's."""
    config = validate(ExportConfig, raw)
    if store.is_remote(config.output):
        raise PipelineError(f"output={config.output}: a model is exported to a folder of this machine; copy it there")
    output = Path(config.output.removeprefix("file://"))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PipelineError(f"output={output} is there already: give a new folder")
    store.check_output(f"{output}.new", "output")  # the folder that it will lie in
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    if missing:
        raise PipelineError(f"{', '.join(missing)} is not installed: pip install 'meta-training-pipeline[onnx]'")
    classifier = load_classifier(config.model, config.tracking.model_dump())
    method, head = _exportable(classifier)
    images = _images(config.images, classifier)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as staging:
        folder = Path(staging) / "export"
        folder.mkdir()
        write_network(method, classifier.preprocess, images[:2], folder / NETWORK)
        shutil.copy(Path(__file__).with_name("portable.py"), folder / PAGE)
        write_atomic(folder / ABOUT, (json.dumps(_about(classifier, head, config, folder), indent=1) + "\n").encode())
        found = compare(classifier, folder, images)
        for what, difference in found.items():
            if not difference <= config.tolerance:
                raise PipelineError(
                    f"the exported {what} differ from the model's by {difference:.2g} of the largest, more than "
                    f"tolerance={config.tolerance:g}: nothing is written"
                )
        if output.exists():
            output.rmdir()
        os.replace(folder, output)
    megabytes = (output / NETWORK).stat().st_size / 2**20
    listed = ", ".join(f"{what} {difference:.1g}" for what, difference in found.items())
    print(f"{output}: {NETWORK} ({megabytes:.1f} MB), {ABOUT} and {PAGE}")
    print(f"  against PyTorch on {len(images)} images, share of the largest value: {listed}")
    return {"model": config.model, "output": str(output), "images": len(images), "differences": found}


def _exportable(classifier: FewShotClassifier) -> tuple[HeadMethod, ClassMeans]:
    method = classifier.method
    name = classifier.spec["method"]["name"]
    head = method.class_means() if isinstance(method, HeadMethod) else None
    alone = method.extendable and method.embeds_once  # a subclass may tune to the support, or look at the queries
    if not isinstance(method, HeadMethod) or head is None or not alone:
        raise PipelineError(
            f"method {name} learns new classes by more than the means of their images (by gradients, a solver, a "
            "network or the queries), which the exported page does not do; methods like prototypical, simple_shot, "
            "imprinted and baseline with method.head=prototype can be exported"
        )
    if looks_at_the_batch(method.backbone):
        raise PipelineError("the network normalises an image by those beside it: it has no answer for one image alone")
    return method, head


def _images(given: str | list[str] | None, classifier: FewShotClassifier) -> np.ndarray:
    """Real images [N, C, H, W] to compare on: the user's, or of the dataset that the model was trained on."""
    if given is not None:
        images = read_queries(given, classifier.shape, max_pixels=classifier.max_pixels).images
    else:
        uri = classifier.origin.get("dataset", {}).get("uri")
        try:
            dataset = Dataset(str(uri))
        except PipelineError as error:
            raise PipelineError(
                f"the model's dataset cannot be read here ({error}): give images=FOLDER, some of the kind it is for"
            ) from error
        rows = np.linspace(0, dataset.manifest.rows - 1, min(CHECKED, dataset.manifest.rows)).astype(np.int64)
        images = dataset.gather(rows)
    if len(images) < 2 * CLASSES:
        raise PipelineError(f"{len(images)} images are too few to compare on: give images=FOLDER with {2 * CLASSES}")
    return images[np.linspace(0, len(images) - 1, min(CHECKED, len(images))).astype(np.int64)]


class _Network(nn.Module):
    """uint8 images [N, C, H, W] to what the head sees of them [N, D]."""

    def __init__(self, method: HeadMethod, preprocess: nn.Module) -> None:
        super().__init__()
        self.method, self.preprocess = method, preprocess

    def forward(self, images: Tensor) -> Tensor:
        return self.method.project(self.method.backbone(self.preprocess(images)))


def write_network(method: HeadMethod, preprocess: nn.Module, example: np.ndarray, path: Path) -> None:
    """ONNX of preprocessing, backbone and what lies before the head, for any number of images."""
    network = _Network(method, preprocess).eval()
    batch = {"images": {0: torch.export.Dim("batch")}}
    with torch.no_grad(), _quiet():
        torch.onnx.export(
            network, (torch.from_numpy(np.ascontiguousarray(example)),), path, dynamo=True, opset_version=OPSET,
            input_names=["images"], output_names=["features"], dynamic_shapes=batch, external_data=False,
            verbose=False,
        )  # fmt: skip


@contextmanager
def _quiet():
    """The exporter tells its own story at length, in logs and warnings: its result is compared instead."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)


def _about(classifier: FewShotClassifier, head: ClassMeans, config: ExportConfig, folder: Path) -> dict[str, Any]:
    return {
        "schema": 1,
        "model": config.model,
        "shape": list(classifier.shape),
        "network_sha256": file_sha256(folder / NETWORK),
        "head": {**vars(head), "centre": None if head.centre is None else head.centre.tolist()},
        "calibration": None if classifier.calibration is None else classifier.calibration.to_dict(),
        "origin": classifier.origin,
    }


def compare(classifier: FewShotClassifier, folder: Path, images: np.ndarray) -> dict[str, float]:
    """Largest differences of the page in ``folder`` from the model, as shares of the largest value of the model's.

    The features of all images, each alone and many at once; and scores and probabilities, where half of the images are
    enrolled as classes and the others are asked about.
    """
    page = _load(folder / PAGE).FewShot(folder)
    method = classifier.method
    assert isinstance(method, HeadMethod)
    with torch.no_grad():
        ours = method.features(classifier.preprocess(torch.from_numpy(images)[None]))[0].numpy()
    ran = [page.network.run(None, {"images": part})[0] for part in (images, images[:1])]
    theirs = np.concatenate(ran)
    known, new = images[::2], images[1::2]
    labels = [f"class {number % CLASSES}" for number in range(len(known))]
    page.enrol(known, labels)
    answers = classifier.classify(classifier.enrol(known, labels), new)
    _, probabilities, scores, _ = page.classify(new)
    return {
        "features": _difference(theirs, np.concatenate([ours, ours[:1]])),
        "scores": _difference(scores, answers.scores),
        "probabilities": _difference(probabilities, answers.probabilities),
    }


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), np.finfo(np.float32).tiny))


def _load(path: Path) -> Any:
    """The written page itself, not the module that it is a copy of."""
    return SimpleNamespace(**runpy.run_path(str(path)))
