"""Reptile (Nichol, Achiam & Schulman 2018), FOML, and Reptile with weight clustering (Goldblum et al. 2020)."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.batch import Batch, Episodes
from pipeline.errors import PipelineError
from pipeline.functional.flat import flatten, unflatten
from pipeline.functional.inner_loop import Parameters, gradient, loop_tasks, out_of_inference, vmap_tasks
from pipeline.functional.losses import accuracy, labelled, summed_cross_entropy
from pipeline.functional.reptile import DISTANCES, Moments, adam_step, consensus_gradient, task_minibatches
from pipeline.methods._fast_weights import _FastWeights, at_least_one
from pipeline.methods.base import State
from pipeline.nets.by_name import choose
from pipeline.nets.norm import batch_norms
from pipeline.nets.transforms import inside_transform

BATCH_IMAGES = 512  # at once, where every query goes through the network with the whole support set

Minibatch = tuple[Tensor, Tensor]  # images [T, B, C, H, W] and labels [T, B] of one inner step


class _Result(NamedTuple):
    before: Tensor  # [T, P] weights before the last inner step
    after: Tensor  # [T, P] after it
    loss: Tensor  # [T] mean cross-entropy over the inner steps
    accuracy: Tensor  # [T] on the last minibatch, before its step
    penalty: Tensor  # [T] R_i before the last step


class Reptile(_FastWeights):
    """Train on a task by ordinary minibatch steps, then move the start towards where that led (algorithm 2).

    The update theta + eps mean(theta_task - theta) is ``optimizer=sgd`` with ``lr`` = eps, no momentum and no weight
    decay on what :meth:`loss` returns, whose gradient is theta - mean(theta_task); ``schedule=linear`` takes eps from
    1 to 0 as published. The value of the loss is the mean cross-entropy of the inner steps.

    A task's data in training are its support and query images together: 10 shots in the paper's Omniglot runs (15 for
    mini-ImageNet) are ``train.shot=5 train.query=5`` or any other sum. The defaults are those of 5-way Omniglot
    (95.39 and 98.90 for 1 and 5 shots, 97.68 and 99.48 with ``query_statistics=batch``); 20-way takes 10 steps of
    batches of 20 at 5e-4; mini-ImageNet (47.07 / 62.74, with ``batch`` 49.97 / 65.99) takes 8 steps, and batches of 15
    in 5-shot evaluation.

    Args:
        backbone: the features; batch-norm always uses batch statistics.
        inner_lr: step size of the inner optimizer.
        inner_steps, inner_batch: steps on a task in training, and images in each: shuffled, taken one batch after
            another, what remains joined by a new shuffle.
        inner_steps_eval, inner_batch_eval: the same on the support set in evaluation, where the shuffles are fixed.
        inner_optimizer: "adam", in TensorFlow's form, or "sgd".
        beta1, beta2: of Adam. The paper's 0 leaves no momentum.
        moments: Adam's state. "persistent": carried on through all steps of all tasks in their order, as the official
            code, and used but not changed in evaluation; a buffer of the model, which workers replace by the first
            worker's at every step (what ``DistributedDataParallel`` does with buffers). With a penalty they go through
            the first step of every task, then the second of every task. "reset": every task starts afresh.
        loss_reduction: "sum" over the minibatch, as the official code (to Adam it is the same, but for a penalty and
            epsilon), or "mean".
        displacement: "all" inner steps: Reptile. "last": only the last one, which is FOML, the first-order MAML of the
            official code; "last_on_query": FOML with the last step on all query images and the others on the support.
        query_statistics: what normalises a query. "support_and_query": the support set and this one query, as the
            official code; "support": the support set, which is faster; "batch": all queries (transductive).
        consensus: coefficient of the weight-clustering penalty (51.94 / 68.02 on mini-ImageNet): every inner loss gets
            + consensus * d(theta_i, mean of theta over the tasks of the step)^2, and the tasks advance side by side.
            With several workers the mean is over all of them. 0: none. There is no official code; what follows are
            the readings of the text.
        consensus_distance: d. "filter_normalised": every filter (row of a weight) is first scaled to unit norm, biases
            and gains count plainly; "filter_relative": differences in units of the norm of the mean's filter; "l2".
        consensus_mean: "full", the literal reading: the gradient knows that theta_i is 1/m of the mean; "constant": it
            does not.
        consensus_order: "simultaneous" (Jacobi): in every inner step all tasks are pulled to the mean before it;
            "sequential": one task after the other, each to a mean that has the moves of those before it; on one worker
            only.
        inner_loop: "loop" over tasks, "vmap" over all at once, or "auto": on CPU and with convolutions the loop,
            otherwise vmap. Persistent moments are carried from task to task, which is a loop in training.
    """

    few_values = 0  # first-order steps on CPU: the loop was never much slower than vmap, and up to six times as fast
    first_moment: Tensor | None
    second_moment: Tensor
    moment_steps: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        way: int,
        inner_lr: float = 1e-3,
        inner_steps: int = 5,
        inner_batch: int = 10,
        inner_steps_eval: int = 50,
        inner_batch_eval: int = 5,
        inner_optimizer: str = "adam",
        beta1: float = 0.0,
        beta2: float = 0.999,
        moments: str = "persistent",
        loss_reduction: str = "sum",
        displacement: str = "all",
        query_statistics: str = "support_and_query",
        consensus: float = 0.0,
        consensus_distance: str = "filter_normalised",
        consensus_mean: str = "full",
        consensus_order: str = "simultaneous",
        inner_loop: str = "auto",
    ) -> None:
        super().__init__(backbone, way, inner_loop)
        at_least_one(
            inner_steps=inner_steps, inner_batch=inner_batch,
            inner_steps_eval=inner_steps_eval, inner_batch_eval=inner_batch_eval,
        )  # fmt: skip
        self.inner_lr, self.beta1, self.beta2, self.consensus = inner_lr, beta1, beta2, consensus
        self.inner_steps, self.inner_steps_eval = inner_steps, inner_steps_eval
        self.inner_batch, self.inner_batch_eval = inner_batch, inner_batch_eval
        self.inner_optimizer = choose("inner_optimizer", inner_optimizer, ("adam", "sgd"))
        self.moments = choose("moments", moments, ("persistent", "reset"))
        self.loss_reduction = choose("loss_reduction", loss_reduction, ("sum", "mean"))
        self.displacement = choose("displacement", displacement, ("all", "last", "last_on_query"))
        statistics = ("support_and_query", "support", "batch")
        self.query_statistics = choose("query_statistics", query_statistics, statistics)
        self.consensus_distance = choose("consensus_distance", consensus_distance, DISTANCES)
        self.consensus_mean = choose("consensus_mean", consensus_mean, ("full", "constant"))
        self.consensus_order = choose("consensus_order", consensus_order, ("simultaneous", "sequential"))
        self._persistent = inner_optimizer == "adam" and moments == "persistent"
        size = sum(shape.numel() for shape in self._shapes().values())
        self.register_buffer("first_moment", torch.zeros(size) if self._persistent and beta1 else None)
        self.register_buffer("second_moment", torch.zeros(size) if self._persistent else None)
        self.register_buffer("moment_steps", torch.tensor(0) if self._persistent else None)

    def check_batches(self, workers: int, grouping: Sequence[int] | None) -> None:
        if self.consensus and self.consensus_order == "sequential" and workers > 1:
            raise PipelineError("consensus_order=sequential runs on one worker: take simultaneous, or one worker")

    def adapt(self, support: Tensor, labels: Tensor, way: int | None = None) -> State:
        """The weights [T, ...] by name after inner steps on the support; with them what normalises the queries."""
        self.check_support(labels, way)
        steps, size = self.inner_steps, self.inner_batch
        if not self.training:
            steps, size = self.inner_steps_eval, self.inner_batch_eval
        with out_of_inference(support, labels) as (support, labels), torch.no_grad():
            index = task_minibatches(labels, size, steps, seed=0)
            result, _ = self._train([_pick(support, labels, i) for i in index], self._moments().expand(len(support)))
            state: State = {name: value.clone() for name, value in unflatten(result.after, self._shapes()).items()}
            if self.query_statistics == "support":
                state |= self._each_task(support)(self._statistics, state, support)
            if self.query_statistics == "support_and_query" and batch_norms(self.backbone):
                state["support"] = support
        return state

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`meta_loss`; in evaluation the cross-entropy of the queries."""
        assert isinstance(batch, Episodes)
        if not self.training:
            return super().loss(batch)
        self.check_support(batch.support_labels, batch.way)
        return self.meta_loss(self._minibatches(batch))

    def meta_loss(self, minibatches: Sequence[Minibatch]) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar whose gradient is theta - mean over tasks of theta_task after inner steps on ``minibatches``.

        With ``displacement`` "last..." theta_task takes only the last of these steps from theta. The scalar's value is
        the mean cross-entropy of the inner steps.
        """
        tasks, moments = len(minibatches[0][0]), self._moments()
        if not self._persistent:
            found, _ = self._train(minibatches, moments.expand(tasks), self.consensus != 0)
        elif self.consensus:
            found, moments = self._train(minibatches, moments, True)
        else:  # what one task leaves of the moments, the next begins with
            parts = []
            for t in range(tasks):
                part, moments = self._train([(x[t : t + 1], y[t : t + 1]) for x, y in minibatches], moments)
                parts.append(part)
            found = _Result(*(torch.cat(values) for values in zip(*parts, strict=True)))
        self._remember(moments)
        weights = flatten(self._weights())
        start = weights.detach() if self.displacement == "all" else found.before
        surrogate = (weights * (start - found.after).mean(0)).sum()
        figures = {"accuracy": found.accuracy.mean()}
        if self.consensus:
            figures["consensus"] = found.penalty.mean()
        return found.loss.mean() + surrogate - surrogate.detach(), figures

    def _minibatches(self, batch: Episodes) -> list[Minibatch]:
        """One for every inner step, from all images of the tasks."""

        def drawn(images: Tensor, labels: Tensor, steps: int) -> list[Minibatch]:
            return [_pick(images, labels, i) for i in task_minibatches(labels, self.inner_batch, steps)]

        if self.displacement == "last_on_query":
            before = drawn(batch.support, batch.support_labels, self.inner_steps - 1)
            return [*before, (batch.query, batch.query_labels)]
        labels = torch.cat([batch.support_labels, batch.query_labels], dim=1)
        return drawn(torch.cat([batch.support, batch.query], dim=1), labels, self.inner_steps)

    @torch.no_grad()
    def _train(
        self, minibatches: Sequence[Minibatch], moments: Moments, penalised: bool = False
    ) -> tuple[_Result, Moments]:
        """Inner steps of T tasks side by side, a step of all before the next of any.

        Args:
            moments: [P], which all tasks use and change in turn, or [T, P], one for every task.
        """
        weights = flatten(self._weights()).expand(len(minibatches[0][0]), -1)
        before, losses = weights, []
        penalty = right = weights.new_zeros(len(weights))
        for images, labels in minibatches:
            each_task = loop_tasks if len(images) == 1 else self._each_task(images)
            one = partial(self._gradient_one, each_task is vmap_tasks)
            found = each_task(one, weights, images, labels)
            before, right = weights, found["accuracy"]
            losses.append(found["loss"])
            if penalised:
                weights, moments, penalty = self._towards_consensus(weights, found["gradient"], moments)
            else:
                weights, moments = self._step(weights, found["gradient"], moments)
        return _Result(before, weights, torch.stack(losses).mean(0), right, penalty), moments

    def _gradient_one(self, mapped: bool, weights: Tensor, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One task: gradient [P] of the inner loss at weights [P], the mean cross-entropy and the accuracy."""

        def loss(parameters: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
            logits = self._logits(parameters, images)
            total = summed_cross_entropy(logits, labels)
            mean = total / labelled(labels)
            chosen = total if self.loss_reduction == "sum" else mean
            return chosen, {"loss": mean, "accuracy": accuracy(logits, labels)}

        gradients, figures = gradient(loss, unflatten(weights, self._shapes()), mapped)
        return {"gradient": flatten(gradients), **figures}

    def _step(self, weights: Tensor, gradients: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        """A step of the inner optimizer for weights [T, P]."""
        if self.inner_optimizer == "sgd":
            return weights - self.inner_lr * gradients, moments
        if moments.second.ndim == weights.ndim:
            moments, change = adam_step(moments, gradients, self.inner_lr, self.beta1, self.beta2)
            return weights - change, moments
        moved = []
        for own, found in zip(weights, gradients, strict=True):
            moments, change = adam_step(moments, found, self.inner_lr, self.beta1, self.beta2)
            moved.append(own - change)
        return torch.stack(moved), moments

    def _towards_consensus(
        self, weights: Tensor, gradients: Tensor, moments: Moments
    ) -> tuple[Tensor, Moments, Tensor]:
        """The same step with the penalty's gradient in it; the penalties [T] last."""

        def pull(own: Tensor, mean: Tensor, tasks: int) -> tuple[Tensor, Tensor]:
            full = self.consensus_mean == "full"
            return consensus_gradient(own, mean, tasks, self._shapes(), self.consensus_distance, full)

        if self.consensus_order == "simultaneous":
            mean, tasks = _mean_of_all_workers(weights)
            penalty, towards = pull(weights, mean, tasks)
            return *self._step(weights, gradients + self.consensus * towards, moments), penalty
        self.check_batches(_workers(), None)
        weights, penalties, parts = weights.clone(), [], []
        shared = moments.second.ndim == 1
        for i in range(len(weights)):
            task = slice(i, i + 1)
            penalty, towards = pull(weights[task], weights.mean(0), len(weights))
            before = moments if shared else moments.of_task(i)
            weights[task], after = self._step(weights[task], gradients[task] + self.consensus * towards, before)
            moments = after if shared else moments
            parts.append(after)
            penalties.append(penalty)
        return weights, moments if shared else Moments.join(parts), torch.cat(penalties)

    def _moments(self) -> Moments:
        """Adam's state before the first inner step: the buffers', or nothing yet; vectors of zeros for sgd, unused."""
        if self._persistent:
            return Moments(self.first_moment, self.second_moment, self.moment_steps)
        like = flatten(self._weights()).detach()
        zeros = torch.zeros_like(like)
        return Moments(zeros if self.beta1 else None, zeros, torch.zeros((), dtype=torch.int64, device=like.device))

    def _remember(self, moments: Moments) -> None:
        if self._persistent:
            self.second_moment.copy_(moments.second)
            self.moment_steps.copy_(moments.steps)
        if self.first_moment is not None and moments.first is not None:
            self.first_moment.copy_(moments.first)

    def _classify_one(self, state: State, query: Tensor) -> Tensor:
        support = state.get("support")
        if support is None:
            return super()._classify_one(state, query)

        def answer(image: Tensor) -> Tensor:
            return self._logits(state, torch.cat([support, image.unsqueeze(0)]))[-1]

        if not (inside_transform() or self._by_vmap(query)):
            return torch.stack([answer(image) for image in query])
        return torch.func.vmap(answer, chunk_size=max(1, BATCH_IMAGES // (len(support) + 1)))(query)


def _pick(images: Tensor, labels: Tensor, index: Tensor) -> Minibatch:
    """Items [T, B] of images [T, N, ...] and labels [T, N]."""
    task = torch.arange(len(index), device=index.device).unsqueeze(1)
    return images[task, index], labels[task, index]


def _workers() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _mean_of_all_workers(weights: Tensor) -> tuple[Tensor, int]:
    """Mean [P] of the weights [T, P] of the tasks of all workers, and their number; every worker has as many."""
    total = weights.sum(0)
    if _workers() > 1:
        dist.all_reduce(total)
    tasks = len(weights) * _workers()
    return total / tasks, tasks
