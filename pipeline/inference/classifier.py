"""A meta-trained model as its users hold it: numpy arrays in, answers out."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.images import MAX_PIXELS
from pipeline.errors import PipelineError
from pipeline.files import file_sha256, tensors_to_bytes, write_atomic
from pipeline.inference.answers import Answers
from pipeline.inference.background import Background
from pipeline.inference.calibration import Calibration, CalibrationPoint
from pipeline.inference.enrolment import Enrolment, Label, label_kind, plain_labels
from pipeline.inference.files import model_fingerprint, read_json, read_tensors
from pipeline.inference.scores import OF_BACKGROUND, OF_ONE_CLASS, Evidence, gather_evidence, score_queries
from pipeline.methods.base import Method, State
from pipeline.model import build_model, build_preprocess

SCHEMA_VERSION = 1
WEIGHTS, MODEL = "weights.safetensors", "model.json"
PIXELS_AT_ONCE = 2**20  # of queries embedded together: with Conv-4 about half a gigabyte of activations
_REMEDY = "register or export the model again"


class FewShotClassifier:
    """Enrols classes from a few images each and classifies queries against them.

    A model whose batch-norm uses the statistics of the queries (transductive) answers a query in the company of the
    others that are asked with it; every other model answers each query by itself.

    Threads may share a classifier, as those of a server do: methods that adapt their network to a task put other
    weights and statistics into it meanwhile, so that adapting and answering take turns.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        method: Method,
        preprocess: nn.Module,
        calibration: Calibration | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.spec = dict(spec)
        self.method = method.eval()
        self.preprocess = preprocess.eval()
        self.calibration = calibration
        self.origin = dict(origin or {})  # where the model came from: run, step, dataset, figures
        self.shape: tuple[int, int, int] = tuple(spec["input"]["shape"])
        # As large images as were ingested to train it, and none smaller refused: a limit there says what to learn from
        self.max_pixels: int = max(MAX_PIXELS, (self.origin.get("dataset") or {}).get("max_pixels", 0))
        self._turn = threading.Lock()
        self._fingerprint: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: all but the lock, which each has of its own, and never while a task is learnt."""
        with self._turn:
            return {**vars(self), "method": copy.deepcopy(self.method), "_turn": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _turn=threading.Lock())

    @classmethod
    def from_weights(
        cls,
        spec: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        calibration: Calibration | None = None,
        origin: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
    ) -> FewShotClassifier:
        """Build the model that ``spec`` describes and give it ``weights``, whose names and shapes must be its own."""
        if not isinstance(spec, Mapping):
            raise PipelineError(f"the model's description is no object but {type(spec).__name__}")
        with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away: leave the caller's numbers alone
            method = build_model(dict(spec))
        _check_weights(method.state_dict(), weights)
        method.load_state_dict(dict(weights))
        return cls(spec, method.to(device), build_preprocess(dict(spec)).to(device), calibration, origin)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> FewShotClassifier:
        """Read a folder of ``model.json`` and ``weights.safetensors``, which :meth:`save` wrote."""
        folder = Path(folder)
        content = read_json(folder / MODEL, _REMEDY)
        try:
            if content["schema"] != SCHEMA_VERSION:
                raise ValueError(f"schema {content['schema']} is not {SCHEMA_VERSION}, the one this code reads")
            spec, expected, origin = content["spec"], content["weights_sha256"], content["origin"]
            calibration = None if content["calibration"] is None else Calibration.from_dict(content["calibration"])
            if not isinstance(spec, dict) or not isinstance(origin, dict):
                raise ValueError("spec and origin are not objects")
        except (KeyError, ValueError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise PipelineError(f"{folder / MODEL} describes no model ({why}); {_REMEDY}") from error
        weights, _ = read_tensors(folder / WEIGHTS, _REMEDY)
        if file_sha256(folder / WEIGHTS) != expected:
            raise PipelineError(f"{folder / WEIGHTS} is not the file that {MODEL} names (SHA-256 differs); {_REMEDY}")
        return cls.from_weights(spec, weights, calibration, origin, device)

    def save(self, folder: str | Path) -> None:
        """Write ``weights.safetensors``, then ``model.json`` that names its SHA-256."""
        folder = Path(folder)
        with self._turn:
            weights = tensors_to_bytes(self.method.state_dict())
        write_atomic(folder / WEIGHTS, weights)
        content = {
            "schema": SCHEMA_VERSION,
            "spec": self.spec,
            "weights_sha256": file_sha256(folder / WEIGHTS),
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "origin": self.origin,
        }
        write_atomic(folder / MODEL, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of specification and weights: an enrolment belongs to exactly one."""
        with self._turn:  # while a task is learnt, the weights may be that task's
            if self._fingerprint is None:
                self._fingerprint = model_fingerprint(self.spec, self.method.state_dict())
            return self._fingerprint

    def enrol(self, images: np.ndarray, labels: Sequence[Label] | np.ndarray, keep_images: bool = True) -> Enrolment:
        """Learn classes from a support set.

        Args:
            images: uint8 [S, C, H, W] of the model's shape.
            labels: [S] whole numbers or names, any number of images per class.
            keep_images: keep the support images in the enrolment, so that classes can be given more images later,
                and be added where the method has to learn all of them anew. Without, only the state is kept.
        """
        self._check_images(images)
        names = plain_labels(labels, len(images))
        if not names:
            raise PipelineError("no support images: enrol at least one image of one class")
        classes = list(dict.fromkeys(names))
        positions = _positions(classes, names)
        note = f"{len(classes)} classes learnt from {len(images)} images"
        return self._adapt(classes, images, positions, keep_images, note)

    def extend(self, enrolment: Enrolment, images: np.ndarray, labels: Sequence[Label] | np.ndarray) -> Enrolment:
        """Add classes, or images to classes that are there. The enrolment that is given stays as it is.

        New classes leave the others untouched (their logits stay bitwise the same) where the method can add a class.
        Otherwise, and for new images of old classes, all is learnt anew from the images that the enrolment keeps;
        ``note`` of the result says which.
        """
        self._check_enrolment(enrolment)
        self._check_images(images)
        names = plain_labels(labels, len(images))
        if not names:
            raise PipelineError("no support images: extend by at least one image of one class")
        if label_kind([*enrolment.classes, *names]) is None:
            raise PipelineError("the enrolment's labels and the new ones are numbers and names: give one kind")
        if isinstance(names[0], str):  # an enrolment of old may hold names in another Unicode form
            enrolled = dict(zip(plain_labels(enrolment.classes, enrolment.way), enrolment.classes, strict=True))
            names = [enrolled.get(name, name) for name in names]
        new = [name for name in dict.fromkeys(names) if name not in set(enrolment.classes)]
        classes = [*enrolment.classes, *new]
        positions = _positions(classes, names)
        only_new = len(new) == len(set(names))
        all_images = all_positions = None
        if enrolment.images is not None and enrolment.positions is not None:
            all_images = np.concatenate([enrolment.images, images])
            all_positions = np.concatenate([enrolment.positions, positions])
        if only_new:
            with self._turn, torch.no_grad():
                state = self.method.extend(self._state(enrolment), *self._support(images, positions))
            if state is not None:
                counts = [*enrolment.counts, *np.bincount(positions)[enrolment.way :].tolist()]
                note = f"{len(new)} classes added, {enrolment.way} untouched"
                return Enrolment(classes, counts, _kept(state), enrolment.model, all_images, all_positions, note)
        if all_images is None or all_positions is None:
            what = "add a class without learning all anew" if only_new else "give an enrolled class more images"
            raise PipelineError(f"this enrolment keeps no support images, so it cannot {what}; enrol all classes again")
        why = "this method cannot add a class to what it learnt" if only_new else "enrolled classes got more images"
        note = f"all {len(classes)} classes learnt anew from {len(all_images)} images: {why}"
        return self._adapt(classes, all_images, all_positions, True, note)

    def classify(
        self,
        enrolment: Enrolment,
        images: np.ndarray,
        threshold: float | str | None = "auto",
        unknown_pass: float | None = None,
    ) -> Answers:
        """Answer queries.

        Args:
            enrolment: what :meth:`enrol` or :meth:`extend` of the same model returned.
            images: uint8 [N, C, H, W] of the model's shape; embedded in chunks, so memory does not grow with N.
            threshold: least score of a known query. "auto" is the calibrated one of the nearest number of classes and
                images per class, and none where the model was not calibrated; "none" or None knows every query.
            unknown_pass: share of strangers that the calibrated threshold is to let pass; None: the calibration's own.

        The score is the one that told strangers best in calibration, without one the maximum logit; probabilities have
        the calibrated temperature.
        """
        limit = self.threshold_for(enrolment, threshold, unknown_pass)
        point = self.point_for(enrolment)
        name, temperature = ("logit", 1.0) if point is None else (point.score, point.temperature)
        logits, scores = self._told(enrolment, images, name, temperature)
        known = np.ones(len(scores), dtype=bool) if limit is None else scores.astype(np.float64) >= limit
        probabilities = torch.softmax(torch.from_numpy(logits) / temperature, dim=1).numpy()
        labels = [enrolment.classes[index] for index in logits.argmax(axis=1)]
        return Answers(labels, probabilities, scores, known, list(enrolment.classes), limit, name)

    def logits(self, enrolment: Enrolment, images: np.ndarray) -> np.ndarray:
        """Logits float32 [N, way] of queries uint8 [N, C, H, W]."""
        return self._told(enrolment, images, "logit", 1.0)[0]

    def _told(
        self, enrolment: Enrolment, images: np.ndarray, score: str, temperature: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits float32 [N, way] and scores float32 [N] of queries."""
        self._check_enrolment(enrolment)
        self._check_images(images)
        state = self._state(enrolment)
        background = self.calibration.background if self.calibration and score in OF_BACKGROUND else None
        at_once = max(1, PIXELS_AT_ONCE // (self.shape[1] * self.shape[2]))
        logits, scores = np.empty((len(images), enrolment.way), np.float32), np.empty(len(images), np.float32)
        # Chunks of one size, but for one image: a transductive method normalises each by itself.
        edges = np.linspace(0, len(images), math.ceil(len(images) / at_once) + 1).astype(int)
        for start, end in pairwise(edges):
            told = self._answer(state, self.preprocess(self._tensor(images[start:end])), background)
            value = score_queries(score, told, temperature)
            if value is None:
                raise PipelineError(f"calibrated by a score, {score!r}, that this method cannot tell; {_REMEDY}")
            logits[start:end], scores[start:end] = told.logits[0].cpu().numpy(), value[0].cpu().numpy()
        if not (np.isfinite(logits).all() and np.isfinite(scores).all()):
            raise PipelineError("the model answers with NaN or infinite scores, which mean nothing: train it again")
        return logits, scores

    def _answer(self, state: State, query: Tensor, background: Background | None) -> Evidence:
        """What the model says about one chunk; a state that is not of this method is refused."""
        try:
            with self._turn, torch.no_grad():
                return gather_evidence(self.method, state, query, background)
        except torch.OutOfMemoryError:
            raise
        except (KeyError, IndexError, RuntimeError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise PipelineError(f"this enrolment holds nothing that this model learnt ({why}); enrol again") from error

    def point_for(self, enrolment: Enrolment) -> CalibrationPoint | None:
        """What calibration found for a number of classes and images like the enrolment's.

        None without a calibration, and for one class where only several were calibrated, by a score that compares them.
        """
        if self.calibration is None:
            return None
        found = self.calibration.nearest(enrolment.way, enrolment.shot)
        return None if enrolment.way == 1 and found.score not in OF_ONE_CLASS else found

    def threshold_for(
        self, enrolment: Enrolment, threshold: float | str | None = "auto", unknown_pass: float | None = None
    ) -> float | None:
        """The number that ``threshold`` stands for with this enrolment; None when every query is known."""
        if unknown_pass is not None and threshold != "auto":
            raise PipelineError(f"unknown.pass={unknown_pass:g} sets the threshold: leave out threshold={threshold}")
        if threshold is None or threshold == "none":
            return None
        if threshold == "auto":
            point = self.point_for(enrolment)
            if unknown_pass is None:
                return None if point is None else point.threshold
            if point is None:
                raise PipelineError(
                    f"unknown.pass={unknown_pass:g}: this model has no calibration for {enrolment.way} classes, since "
                    "its data set has too few for validation; give a threshold"
                )
            return point.rate(unknown_pass).threshold
        try:
            limit = float(threshold)
        except (TypeError, ValueError) as error:
            raise PipelineError(f"threshold={threshold!r}: give auto, none or a number") from error
        if not math.isfinite(limit):
            raise PipelineError(f"threshold={threshold!r}: give auto, none or a finite number")
        return limit

    def _adapt(
        self, classes: list[Label], images: np.ndarray, positions: np.ndarray, keep_images: bool, note: str
    ) -> Enrolment:
        self.method.check_way(len(classes))
        with self._turn, torch.no_grad():  # a method that learns by gradients enables them where it needs them
            support, labels = self._support(images, positions)
            state = self.method.adapt(support, labels, len(classes))
        return Enrolment(
            classes=classes,
            counts=np.bincount(positions, minlength=len(classes)).tolist(),
            state=_kept(state),
            model=self.fingerprint,
            images=images.copy() if keep_images else None,
            positions=positions if keep_images else None,
            note=note,
        )

    def _state(self, enrolment: Enrolment) -> State:
        """What was learnt, on the model's device."""
        device = self._device()
        return {name: tensor.to(device) for name, tensor in enrolment.state.items()}

    def _support(self, images: np.ndarray, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images [1, S, C, H, W], preprocessed, and labels [1, S], on the model's device."""
        support = self.preprocess(self._tensor(images))
        return support, torch.from_numpy(positions)[None].to(support.device)

    def _tensor(self, images: np.ndarray) -> Tensor:
        own = np.require(images, requirements=["C", "W"])  # a copy of what PyTorch must not write to
        return torch.from_numpy(own)[None].to(self._device())

    def _device(self) -> torch.device:
        return next(chain(self.method.parameters(), self.preprocess.buffers())).device  # some methods learn nothing

    def _check_images(self, images: np.ndarray) -> None:
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != self.shape:
            got = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
            raise PipelineError(f"images are {got}: this model takes uint8 [N, {', '.join(map(str, self.shape))}]")

    def _check_enrolment(self, enrolment: Enrolment) -> None:
        if enrolment.model != self.fingerprint:
            raise PipelineError("the enrolment was made by another model, whose state means nothing here; enrol again")


def _kept(state: State) -> State:
    """As an enrolment keeps what a method learnt."""
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def _positions(classes: list[Label], names: list[Label]) -> np.ndarray:
    index = {name: position for position, name in enumerate(classes)}
    return np.asarray([index[name] for name in names], dtype=np.int64)


def _check_weights(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or unknown:
        what = [f"{name!r} is missing" for name in missing[:1]] + [
            f"{name!r} is not the model's" for name in unknown[:1]
        ]
        raise PipelineError(f"the weights are not those of this model: {'; '.join(what)}; {_REMEDY}")
    for name, tensor in own.items():
        if given[name].shape != tensor.shape or given[name].dtype != tensor.dtype:
            got, want = (f"{t.dtype} {list(t.shape)}" for t in (given[name], tensor))
            raise PipelineError(f"weight {name!r} is {got}, not {want}; {_REMEDY}")
    for name, tensor in given.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise PipelineError(f"weight {name!r} holds NaN or infinite values: the training diverged; train it again")
