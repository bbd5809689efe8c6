"""Novel classes among the base classes: accuracy in the joint space (Qi, Brown & Lowe 2018, section 4)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.batch import Images
from pipeline.config import Section
from pipeline.config_kinds import Count, Positive
from pipeline.data.batches import turned
from pipeline.data.dataset import check_shards, class_table, open_dataset, read_manifest
from pipeline.data.episodes import EpisodeSpec, check_spec, plan_episodes
from pipeline.errors import PipelineError
from pipeline.evaluation.evaluate import check_images
from pipeline.evaluation.model import Built, Model
from pipeline.evaluation.spread import OnCluster, cores, fetched, parts
from pipeline.evaluation.statistics import Estimate, estimate
from pipeline.methods.imprinted import Imprinted, fine_tune
from pipeline.model import build_model

CHUNK = 1000  # images embedded at once
FIGURES = ("novel", "all", "base", "novel_only")


class FineTuning(Section):
    """Fine-tuning of the joint classifier with class-balanced batches ("Imprint + FT").

    The rate is multiplied by ``lr_decay`` after every ``decay_every`` steps (four epochs in the paper); None: it stays.
    """

    steps: Count
    lr: Positive
    batch_size: Count
    lr_decay: Positive = 0.94
    decay_every: Count | None = None


@dataclass(frozen=True)
class GeneralizedProtocol:
    """All classes of ``split``, with ``shot`` images each, imprinted beside the classes of ``base_split``."""

    dataset: str
    base_split: str
    holdout: float  # share of every base class that was kept out of training; base queries come from it
    split: str
    shot: int
    query: int  # queries per class, base and novel alike
    draws: int
    seed: int
    fine_tuning: FineTuning | None = None


@dataclass(frozen=True)
class GeneralizedResult:
    """Accuracies of every draw, [draws] each: novel and base queries among all classes, all queries among all
    classes, and novel queries among the novel classes alone."""

    protocol: GeneralizedProtocol
    accuracies: dict[str, np.ndarray] = field(repr=False)

    def estimates(self) -> dict[str, Estimate]:
        return {name: estimate(values) for name, values in self.accuracies.items()}

    def summary(self) -> dict[str, Any]:
        q = self.protocol
        out: dict[str, Any] = {"split": q.split, "shot": q.shot, "query": q.query, "draws": q.draws, "seed": q.seed}
        out["fine_tuning"] = vars(q.fine_tuning) if q.fine_tuning else None
        for name, found in self.estimates().items():
            out[name] = {"accuracy": found.mean, "interval": found.interval}
        return out


def evaluate_joint(model: Model, protocol: GeneralizedProtocol, gpus: float = 0.0) -> GeneralizedResult:
    """Measure every draw, spread over the cluster."""
    if not isinstance(build_model(model.spec), Imprinted):
        name = model.spec["method"]["name"]
        raise PipelineError(
            f"protocol=generalized needs a method with weights for its base classes, which {name} has not"
        )
    manifest = read_manifest(protocol.dataset)
    if model.fingerprint not in (None, manifest.fingerprint):  # its weights stand for classes by their numbers there
        raise PipelineError(
            f"protocol=generalized measures the classes that {model.label} was trained on, and {protocol.dataset} is "
            "another dataset, or has changed since: give dataset=FOLDER of what it was trained on, or train anew"
        )
    check_images(model, manifest)
    check_shards(protocol.dataset)
    base = class_table(manifest, protocol.base_split, "held", protocol.holdout)
    if int(base.counts.min()) < protocol.query:
        raise PipelineError(
            f"query={protocol.query}: train.holdout={protocol.holdout} of the run kept only {int(base.counts.min())} "
            "images of a base class aside"
        )
    novel = class_table(manifest, protocol.split)
    check_spec(novel, EpisodeSpec(len(novel), protocol.shot, protocol.query), "")
    numbers = parts(protocol.draws, max(1, min(10, -(-protocol.draws // cores()))))
    found = fetched(OnCluster(model, gpus).spread(_draws, numbers, protocol))
    return GeneralizedResult(protocol, {name: np.concatenate([part[name] for part in found]) for name in FIGURES})


def _draws(built: Built, numbers: range, protocol: GeneralizedProtocol) -> dict[str, np.ndarray]:
    measured = _Measured(built, protocol)
    rows = [measured.draw(number) for number in numbers]
    return {name: np.asarray([row[name] for row in rows]) for name in FIGURES}


class _Measured:
    """A base classifier and the images that it is measured on."""

    def __init__(self, built: Built, protocol: GeneralizedProtocol) -> None:
        assert isinstance(built.method, Imprinted)
        self.method, self.preprocess, self.device, self.protocol = built.method, *built[1:], protocol
        self.dataset = open_dataset(protocol.dataset)
        manifest = self.dataset.manifest
        self.novel = class_table(manifest, protocol.split)
        self.training = class_table(manifest, protocol.base_split, "kept", protocol.holdout)
        held = class_table(manifest, protocol.base_split, "held", protocol.holdout)
        rows = (held.starts[:, None] + np.arange(protocol.query)).reshape(-1)
        self.base_images = self._images(rows, np.repeat(held.ids, protocol.query))  # [base * query, C, H, W]
        self.base_labels = torch.arange(len(held)).repeat_interleave(protocol.query)

    def draw(self, number: int) -> dict[str, float]:
        """Imprint one draw of supports, fine-tune if asked, and answer all queries."""
        protocol, novel = self.protocol, self.novel
        spec = EpisodeSpec(len(novel), protocol.shot, protocol.query)
        plan = plan_episodes(novel, spec, protocol.seed, np.asarray([number]))
        images = self._images(plan.rows[0], np.take_along_axis(plan.classes, plan.labels, axis=1)[0])
        labels = torch.from_numpy(np.array(plan.labels))
        support, query = images[: plan.support], images[plan.support :]
        support_labels, query_labels = labels[:, : plan.support], labels[0, plan.support :]
        with torch.no_grad():
            state = self.method.joint_state(support[None], support_labels.to(self.device), plan.way)
        model = self.method
        if protocol.fine_tuning is not None:
            model, how = model.with_classes(state), protocol.fine_tuning
            batches = self._batches(how, support, support_labels[0], number)
            fine_tune(model, batches, how.lr, lr_decay=how.lr_decay, decay_every=how.decay_every)
            state = {"weights": model.weight.detach()[None]}
        bases = self.method.classes
        of_novel = _classify(model, state, query)
        of_base = _classify(model, state, self.base_images)
        right_novel = of_novel.argmax(1) == query_labels + bases
        right_base = of_base.argmax(1) == self.base_labels
        return {
            "novel": right_novel.double().mean().item(),
            "base": right_base.double().mean().item(),
            "all": torch.cat([right_novel, right_base]).double().mean().item(),
            "novel_only": (of_novel[:, bases:].argmax(1) == query_labels).double().mean().item(),
        }

    def _batches(self, how: FineTuning, support: Tensor, labels: Tensor, number: int) -> Iterator[Images]:
        """Class-balanced batches over the base classes' training images and the novel classes' support."""
        table, bases = self.training, self.method.classes
        base_labels = torch.repeat_interleave(torch.arange(len(table)), torch.from_numpy(table.counts))
        rows = np.concatenate([np.arange(s, s + n) for s, n in zip(table.starts, table.counts, strict=True)])
        every = torch.cat([base_labels, labels + bases])
        for index in class_balanced(every, how.batch_size, how.steps, self.protocol.seed * 1_000_003 + number):
            chosen = index.numpy()
            is_base = chosen < len(rows)
            base = chosen[is_base]
            images = torch.empty(len(chosen), *support.shape[1:], device=support.device)
            images[torch.from_numpy(is_base)] = self._images(rows[base], table.ids[base_labels.numpy()[base]])
            images[torch.from_numpy(~is_base)] = support[chosen[~is_base] - len(rows)]
            yield Images(images, every[index].to(support.device))

    def _images(self, rows: np.ndarray, ids: np.ndarray) -> Tensor:
        """The images of ``rows`` [N] of classes ``ids`` [N], preprocessed [N, C, H, W]."""
        pixels = torch.from_numpy(self.dataset.gather(rows))
        return self.preprocess(turned(pixels, ids, self.dataset.manifest.rotations).to(self.device))


def _classify(model: Imprinted, state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Logits [N, classes] on the CPU, in pieces."""
    with torch.no_grad():
        parts = [model.classify(state, part[None])[0].cpu() for part in images.split(CHUNK)]
    return torch.cat(parts)


def class_balanced(labels: Tensor, batch_size: int, batches: int, seed: int) -> Iterator[Tensor]:
    """Indices [batch_size] into ``labels`` [N]: a class uniformly at random, then one of its images, with replacement.

    So a new class with one image is seen as often as one with hundreds. Equal arguments give equal batches.
    """
    generator = torch.Generator().manual_seed(seed)
    order = labels.cpu().argsort(stable=True)
    counts = labels.cpu().bincount()
    starts = counts.cumsum(0) - counts
    present = counts.nonzero().squeeze(1)
    for _ in range(batches):
        classes = present[torch.randint(len(present), (batch_size,), generator=generator)]
        position = (torch.rand(batch_size, generator=generator, dtype=torch.float64) * counts[classes]).long()
        yield order[starts[classes] + position]
