"""What is behind a dataset of features: the network that made them, which lies in the dataset's folder so that what is
trained on features can answer about images; and the images, where they still are."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pipeline import store
from pipeline.data.batches import turned
from pipeline.data.dataset import Dataset, whole_table
from pipeline.data.manifest import FEATURES, Manifest
from pipeline.errors import PipelineError
from pipeline.files import sha256, tensors_to_bytes

NETWORK = "network.safetensors"  # a file beside the manifest, which has its SHA-256


@dataclass(frozen=True)
class Network:
    """A frozen network as it is described and weighted in a model whose backbone it is."""

    backbone: dict[str, Any]  # "backbone" of a model's description
    input: dict[str, Any]  # "input" of it: the shape of images, and how their pixels are scaled
    weights: dict[str, Tensor] = field(repr=False)

    @cached_property
    def content(self) -> bytes:
        """Of the file."""
        return tensors_to_bytes(self.weights)

    @property
    def description(self) -> dict[str, Any]:
        return {"backbone": self.backbone, "input": self.input, "sha256": sha256(self.content)}


def read_network(uri: str, manifest: Manifest) -> Network:
    """The network of the dataset of features at ``uri``.

    Raises:
        PipelineError: its weights are missing or damaged.
    """
    known = manifest.network or {}
    where = store.join(uri, NETWORK)
    content = store.read_bytes(where) if store.exists(where) else b""
    if sha256(content) != known.get("sha256"):
        what = "damaged" if content else "missing"
        raise PipelineError(f"{where}, the features' network, is {what}; make them again with python -m jobs.embed")
    try:
        return Network(dict(known["backbone"]), dict(known["input"]), load(content))
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        why = f"{type(error).__name__}: {error}"
        raise PipelineError(f"{where} is no network ({why}); make the features again") from error


class Pictures:
    """Images to be shown of the rows of a dataset: its own or, of features, those that they were made of."""

    def __init__(self, dataset: Dataset) -> None:
        self._features = dataset.manifest.encoding == FEATURES
        self._images = _images_of(dataset.manifest) if self._features else dataset

    def of(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [N, C, H, W] of the rows [N]; grey where the images are not there any more."""
        if self._images is None:
            return np.full((len(rows), 1, 28, 28), 128, dtype=np.uint8)
        if not self._features:
            return self._images.gather(rows)
        table = whole_table(self._images.manifest)
        position, shown = table.images(rows)
        pixels = torch.from_numpy(self._images.gather(shown))
        return turned(pixels, table.ids[position], self._images.manifest.rotations).numpy()


def _images_of(manifest: Manifest) -> Dataset | None:
    try:
        images = Dataset(str(manifest.source.get("dataset")), verify=False)
    except PipelineError:
        return None
    return images if images.manifest.fingerprint == (manifest.network or {})["dataset"]["fingerprint"] else None
