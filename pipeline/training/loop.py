"""The training loop of one worker, without Ray: a test can call it."""

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.data.dataset import ClassTable, Dataset, class_table
from pipeline.data.episodes import bounds, check_spec
from pipeline.data.manifest import Manifest
from pipeline.data.planners import EpisodePlanner, ImagePlanner, Planner, Views
from pipeline.errors import PipelineError
from pipeline.evaluation.embedded import IMAGES, Embeddings, at_once, embed_part, possible
from pipeline.evaluation.episodic import episode_accuracies, evaluating
from pipeline.evaluation.statistics import Estimate, estimate
from pipeline.methods.base import Method
from pipeline.training.config import TrainConfig
from pipeline.training.diagnosis import check_finite, saturation, still_guessing
from pipeline.training.learner import Learner
from pipeline.training.preemption import Signal
from pipeline.training.workers import Alone, Workers

SETTLED = 200  # steps after which a run that answers by guessing is told so, once


@dataclass
class Hooks:
    """What the loop tells the outside, on every worker."""

    log: Callable[[dict[str, float]], None] = lambda entry: None
    say: Callable[[str], None] = lambda line: None
    save: Callable[[Learner], None] = lambda learner: None
    step: Callable[[int], None] = lambda step: None  # after every step, on every worker: must not wait
    preemption: Callable[[], Signal] = lambda: Signal.NONE  # after every step: the same answer on all workers


@dataclass
class _Window:
    """Figures summed since the last log line."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)  # an auxiliary loss has its turn now and then
    steps: int = 0
    began: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    losses: list[Tensor] = field(default_factory=list)  # of every step, to tell the first that is NaN or infinite

    def add(self, figures: dict[str, Tensor]) -> None:
        self.losses.append(figures.get("loss", torch.zeros(())))
        for key, value in figures.items():
            self.sums[key] = self.sums[key] + value.float() if key in self.sums else value.float()
            self.counts[key] += 1
        self.steps += 1

    def close(self, workers: Workers, per_step: int, waited: float) -> dict[str, float]:
        """Means over the window and the workers, and the speed."""
        names = sorted(self.sums)
        means = workers.mean(torch.stack([self.sums[name] / self.counts[name] for name in names])).tolist()
        seconds = time.perf_counter() - self.began
        return {
            **dict(zip(names, means, strict=True)),
            "steps_per_s": self.steps / seconds,
            "episodes_per_s": self.steps * per_step / seconds,
            "wait_share": (waited - self.waited) / seconds,
        }


def make_planner(config: TrainConfig, manifest: Manifest, method: type[Method] | Method) -> Planner:
    """Episodes, images or both, by the method's regime; what the split cannot serve is refused, if there is a step."""
    train = config.train
    views = Views(manifest.views, manifest.rows, config.seed) if manifest.views else None
    if method.regime == "classical":
        return _image_planner(config, manifest, views)
    table = class_table(manifest, train.split)
    spec = train.spec(train.meta_batch_size, train.balanced_query)
    if config.steps:
        check_spec(table, spec, "train")
    images = _image_planner(config, manifest, views) if method.regime == "both" else None
    return EpisodePlanner(table, spec, config.seed, images, views)


def _image_planner(config: TrainConfig, manifest: Manifest, views: Views | None) -> ImagePlanner:
    train = config.train
    table = class_table(manifest, train.split, "kept", train.holdout)
    classes, images = train.grouping or (1, 1)
    if int(table.counts.min()) < images:
        kept = f" and train.holdout={train.holdout}" if train.holdout else ""
        raise PipelineError(
            f"train.grouping={train.grouping}{kept}: the smallest class of split {train.split!r} has only "
            f"{int(table.counts.min())} images: {table.too_small(images)}; jobs.ingest data.source.min_images leaves "
            "small classes out"
            if train.grouping
            else f"train.holdout={train.holdout} leaves classes of split {train.split!r} without images: "
            f"{table.too_small(1)}; jobs.ingest data.source.min_images leaves small classes out"
        )
    if classes > len(table):
        raise PipelineError(f"train.grouping={train.grouping}: split {train.split!r} has only {len(table)} classes")
    return ImagePlanner(table, train.batch_size, config.seed, train.grouping, views)


def validate(learner: Learner, dataset: Dataset, workers: Workers) -> Estimate:
    """Accuracy on the run's fixed validation episodes, shared by the workers; by the first of the method's candidates,
    where it has some, which is quick."""
    if learner.method.candidates:
        learner.method.settle(learner.method.candidates[0])
    return estimate(_accuracies(learner, dataset, workers, learner.config.validation.episodes))


def _accuracies(learner: Learner, dataset: Dataset, workers: Workers, episodes: int) -> np.ndarray:
    """In the first validation episodes, of all workers."""
    how = learner.config.validation
    table = class_table(dataset.manifest, how.split)
    mine = np.arange(episodes)[workers.rank :: workers.world_size]
    each = bounds(how.way)[1] * (bounds(how.shot)[1] + bounds(how.query)[1])
    embeddings = _embeddings(learner, dataset, table, len(mine) * each)
    accuracies = episode_accuracies(
        learner.method, learner.preprocess, dataset, table, how.spec(), how.seed, mine, how.tasks, learner.device,
        embeddings,
    )  # fmt: skip
    return workers.gather(accuracies)


def _embeddings(learner: Learner, dataset: Dataset, table: ClassTable, images: int) -> Embeddings | None:
    """Of the validation split, where episodes ask for more ``images`` than it has; kept where the run never changes its
    backbone."""
    method = learner.method
    if not possible(method, table, images):
        return None
    if learner.embeddings is not None:
        return learner.embeddings
    with evaluating(method):
        whole = range(int(table.counts.sum()))
        values = embed_part(method.backbone, learner.preprocess, dataset, table, whole, learner.device)
    found = Embeddings(values, table)
    if learner.config.steps == 0 or _stays(method.backbone):
        learner.embeddings = found
    return found


def _stays(backbone: nn.Module) -> bool:
    """Whether training leaves a network as it is: none of its weights is trained, and nothing else moves.

    One without weights may keep what it learns in buffers, and averages of batch-norm move without a gradient.
    """
    mode, weights = backbone.training, list(backbone.parameters())
    moves = any(m.training and getattr(m, "running_mean", None) is not None for m in backbone.train().modules())
    backbone.train(mode)
    return bool(weights) and not moves and not any(p.requires_grad for p in weights)


def choose_candidate(learner: Learner, dataset: Dataset, workers: Workers, say: Callable[[str], None]) -> None:
    """Of the method's candidates, the one that answers its validation episodes best, and the first of equals.

    Each may take minutes, so that each is told.
    """
    method, found = learner.method, {}
    if len(method.candidates) > 1:
        name, episodes = learner.config.method["name"], method.candidate_episodes
        for candidate in method.candidates:
            method.settle(candidate)
            found[candidate] = _accuracies(learner, dataset, workers, episodes).mean()
            say(f"{name}, candidate {candidate:g}: {100 * found[candidate]:.1f} % of {episodes} validation episodes")
        best = max(found, key=lambda candidate: found[candidate])
        method.settle(best)
        say(f"{name} goes on with candidate {best:g}")


@torch.no_grad()
def survey(learner: Learner, dataset: Dataset, workers: Workers) -> None:
    """What the method summarises of the training images, as the weights at hand see them.

    The first worker goes through all images.
    """
    method, how, device = learner.method, learner.config.train, learner.device
    width = method.width
    labels = torch.zeros(0, dtype=torch.int64, device=device)
    with evaluating(method):
        total = method.summarise(torch.zeros(0, width, device=device), labels)
        if total is None:
            return
        table = class_table(dataset.manifest, how.split, "kept", how.holdout)
        images = int(table.counts.sum())
        batch = at_once(method.backbone, learner.preprocess, dataset, device)
        share = batch * -(-IMAGES // batch)
        for start in range(0, images if workers.rank == 0 else 0, share):
            part = range(start, min(start + share, images))
            features = torch.from_numpy(embed_part(method.backbone, learner.preprocess, dataset, table, part, device))
            labels = torch.from_numpy(table.images(np.asarray(part))[0])
            total += cast(Tensor, method.summarise(features.to(device), labels.to(device)))
        method.keep_summary(workers.mean(total) * workers.world_size, images)


def train(
    learner: Learner,
    stream: Iterable[tuple[int, Batch]],
    dataset: Dataset,
    per_step: int,
    workers: Workers | None = None,
    hooks: Hooks | None = None,
    waited: Callable[[], float] = lambda: 0.0,
) -> None:
    """Train to the end of the stream, or until validation has not improved for ``validation.patience`` rounds."""
    body = training(learner, dataset, per_step, workers, hooks, waited)
    try:
        next(body)
        for item in stream:
            body.send(item)
    except StopIteration:
        return


def training(
    learner: Learner,
    dataset: Dataset,
    per_step: int,
    workers: Workers | None = None,
    hooks: Hooks | None = None,
    waited: Callable[[], float] = lambda: 0.0,
) -> Generator[None, tuple[int, Batch], None]:
    """What :func:`train` does, as a coroutine that is sent ``(step, batch)`` and ends when the run does: several runs
    can share a stream."""
    config, workers, hooks = learner.config, workers or Alone(), hooks or Hooks()
    if should_stop(learner.history, config.validation.patience):
        return
    if config.steps == 0:  # a network as it is: measured, and kept
        if learner.validated is None:  # once: of a folder that is kept twice, Ray Train deletes one as the worse
            survey(learner, dataset, workers)
            _log_validation(learner, dataset, workers, hooks)
            hooks.save(learner)
        return
    window = _Window()
    while learner.step < config.steps:
        step, batch = yield
        if step != learner.step:
            raise RuntimeError(f"the stream is at step {step}, the learner at {learner.step}")
        window.add(learner.train_step(batch))
        hooks.step(learner.step)
        if learner.step == 1 and (line := saturation(learner, window.losses[0].item())):
            hooks.say(line)
        done, last = learner.step, learner.step == config.steps
        logs = done % config.log_every == 0 or last
        validates = done % config.validation.every == 0 or last
        signal = hooks.preemption()
        saves = done % config.checkpoint.every == 0 or validates or signal
        if logs or saves:
            figures = window.close(workers, per_step, waited())
            check_finite(learner, window.losses, per_step, workers)
            if logs:
                rate = learner.learning_rate()
                entry = learner.record({**{f"train/{k}": v for k, v in figures.items()}, "train/lr": rate})
                hooks.log(entry)
                told = "accuracy" in figures and SETTLED <= done < SETTLED + config.log_every
                if told and (line := still_guessing(learner, figures["accuracy"], window.steps, per_step)):
                    hooks.say(line)
                window = _Window(waited=waited())
        if saves:  # what is validated is the checkpoint: batch-norm's averages are a step apart, and those of the first
            workers.take_firsts(learner.method.buffers())
            survey(learner, dataset, workers)
        if validates:
            _log_validation(learner, dataset, workers, hooks)
            window.began = time.perf_counter() if window.steps == 0 else window.began
        if saves:
            hooks.save(learner)
        if validates and not last and should_stop(learner.history, config.validation.patience):
            return
        if signal is Signal.LEAVE:
            return


def _log_validation(learner: Learner, dataset: Dataset, workers: Workers, hooks: Hooks) -> None:
    accuracy = validate(learner, dataset, workers)
    hooks.log(learner.record({"val/accuracy": accuracy.mean, "val/interval": accuracy.interval}))
    choose_candidate(learner, dataset, workers, hooks.say)


def should_stop(history: list[dict[str, float]], patience: int | None) -> bool:
    """Whether the last ``patience`` validations were all no better than the best before them."""
    accuracies = [entry["val/accuracy"] for entry in history if "val/accuracy" in entry]
    if patience is None or len(accuracies) <= patience:
        return False
    return max(accuracies[-patience:]) <= max(accuracies[:-patience])


def rounds_since_best(history: list[dict[str, float]]) -> int:
    """Validations after the first of the best."""
    accuracies = [entry["val/accuracy"] for entry in history if "val/accuracy" in entry]
    return len(accuracies) - 1 - accuracies.index(max(accuracies))
