"""Lake's one-shot classification on Omniglot: 20 runs of 20 trials, each within one alphabet (Lake et al. 2015).

A run shows one drawing of each of 20 characters of an alphabet, by one person, and asks for 20 drawings of the same
characters by another. People err in 4.5 % of the trials. Every trial is answered by itself: that each character is
asked for once in a run is not used, except where a model's batch-norm looks at the queries beside each other.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.archives import BadMember, Limits, Member, ZipReader, list_zip, open_zip
from pipeline.data.images import MODES
from pipeline.data.sources.files import Rule, Unusable, decode
from pipeline.data.sources.omniglot import Omniglot
from pipeline.data.sources.tree import hidden_part
from pipeline.errors import PipelineError
from pipeline.evaluation.model import Model
from pipeline.evaluation.statistics import Estimate, estimate
from pipeline.files import file_sha256

RUNS, WAY = 20, 20
HUMAN_ERROR = 0.045
_FILE = re.compile(r"(?:^|.*/)(run\d\d)/(class_labels\.txt|training/class\d\d\.png|test/item\d\d\.png)")
_TRIAL = re.compile(r"(run\d\d)/test/item(\d\d)\.png\s+(run\d\d)/training/class(\d\d)\.png")
_LIMITS = Limits(members=10_000, member_bytes=2**20, total_bytes=2**26)


@dataclass(frozen=True)
class OneShotRuns:
    """All images of the runs, made as those of an ingested dataset: ink is 255."""

    support: Tensor  # [20, 20, C, H, W] uint8, one image of every class in the order of the classes
    query: Tensor  # [20, 20, C, H, W] uint8
    labels: Tensor  # [20, 20] int64, the class of every query
    sha256: str  # of the archive
    name: str = "20 one-shot runs"


@dataclass(frozen=True)
class OneShotResult:
    """The share of right answers in every run."""

    protocol: OneShotRuns = field(repr=False)
    accuracies: np.ndarray  # [20] float64

    @property
    def estimate(self) -> Estimate:
        return estimate(self.accuracies)

    def summary(self) -> dict[str, Any]:
        """Accuracy with its interval over the 20 runs, the error of all 400 trials, and what they were read from."""
        found = self.estimate
        shape = {"way": WAY, "shot": 1, "query": 1, "episodes": RUNS, "archive_sha256": self.protocol.sha256}
        return {**shape, "accuracy": found.mean, "interval": found.interval, "error": 1 - found.mean}


def evaluate_one_shot_runs(model: Model, path: str, seed: int = 0) -> OneShotResult:
    """Answer the 400 trials of Lake's archive ``path`` in this process; ``seed`` is of untrained weights.

    Raises:
        PipelineError: the archive is missing, damaged or another one, or the model cannot answer among 20 classes.
    """
    method, preprocess = model.build(seed=seed)
    method.check_way(WAY)
    runs = read_runs(path, model.spec["input"]["shape"])
    accuracies, classes = np.empty(RUNS), torch.arange(WAY)[None]
    with torch.no_grad():
        for number, (support, query, labels) in enumerate(zip(runs.support, runs.query, runs.labels, strict=True)):
            state = method.adapt(preprocess(support[None]), classes, WAY)
            logits = method.classify(state, preprocess(query[None]))
            accuracies[number] = (logits[0].argmax(-1) == labels).double().mean().item()
    return OneShotResult(runs, accuracies)


def read_runs(path: str, shape: Sequence[int]) -> OneShotRuns:
    """Read the archive of the runs (Lake's all_runs.zip or one_shot_runs.zip) as images of ``shape`` (C, H, W).

    Nothing is unpacked to disk. The 105x105 drawings are resized as those of the ingested dataset are.
    """
    channels, height, width = shape
    if channels not in MODES:
        raise PipelineError(f"the one-shot runs are drawings: the model's images have {channels} channels, not 1 or 3")
    path = str(Path(path).expanduser())
    members: dict[str, Member] = {}
    for member in list_zip(path, _LIMITS):
        found = _FILE.fullmatch(member.name)
        if found and hidden_part(member.name) is None:
            members[f"{found[1]}/{found[2]}"] = member
    names = [f"run{run:02}" for run in range(1, RUNS + 1)]
    kinds = [f"{kind}{n:02}.png" for kind in ("training/class", "test/item") for n in range(1, WAY + 1)]
    files = [f"{run}/{kind}" for run in names for kind in ("class_labels.txt", *kinds)]
    missing = [file for file in files if file not in members]
    if missing:
        raise PipelineError(
            f"{path} has no {missing[0]} ({len(missing):,} files of {RUNS} runs with {WAY} trials are missing); "
            "give Lake's archive of the one-shot runs"
        )
    rule = replace(Omniglot.rule, shape=(channels, height, width))
    with open_zip(path) as archive:
        pixels = [[_image(path, archive, members[f"{run}/{kind}"], rule) for kind in kinds] for run in names]
        labels = [_labels(path, run, _content(path, archive, members[f"{run}/class_labels.txt"])) for run in names]
    images = torch.from_numpy(np.asarray(pixels))
    return OneShotRuns(images[:, :WAY], images[:, WAY:], torch.tensor(labels), file_sha256(path))


def _content(path: str, archive: ZipReader, member: Member) -> bytes:
    try:
        return archive.read(member)
    except BadMember as error:
        raise PipelineError(f"{path} is damaged: its entry {member.name!r} {error}; fetch it again") from error


def _image(path: str, archive: ZipReader, member: Member, rule: Rule) -> np.ndarray:
    content = _content(path, archive, member)
    try:
        return decode(content, rule)[0]
    except Unusable as problem:
        detail = problem.detail or problem.reason
        raise PipelineError(f"{path}: {member.name!r} is no drawing of Omniglot ({detail})") from problem


def _labels(path: str, run: str, content: bytes) -> list[int]:
    """The class of every query of a run, in the order of the queries."""
    answers: dict[int, int] = {}
    for line in content.decode("utf-8", "replace").splitlines():
        if not line.strip():
            continue
        found = _TRIAL.fullmatch(line.strip())
        if not found or {found[1], found[3]} != {run} or not 1 <= int(found[4]) <= WAY:
            raise PipelineError(f"{path}: {run}/class_labels.txt has the line {line.strip()!a}, which names no trial")
        answers[int(found[2]) - 1] = int(found[4]) - 1
    if sorted(answers) != list(range(WAY)):
        raise PipelineError(f"{path}: {run}/class_labels.txt names {len(answers)} of {WAY} trials")
    return [answers[item] for item in range(WAY)]
