"""Why a training ended: a NaN or infinite loss with the episodes it came with, or the cause of a worker's error.

A loss is looked at before anything of its step is saved. An error is told in one line where the input is wrong or a
machine too small, with what to do about it.
"""

import math
import re

import numpy as np
import torch
from torch import Tensor

from pipeline import store
from pipeline.commands import command
from pipeline.errors import Diverged, PipelineError, Unavailable
from pipeline.training.learner import Learner
from pipeline.training.runs import Run
from pipeline.training.workers import Workers

TOO_SMALL = {  # what the error's text has -> what is said
    r"CUDA out of memory|OutOfMemoryError: CUDA": "a GPU has too little memory: lower train.meta_batch_size (or "
    "train.batch_size) or validation.tasks, give precision=bfloat16, or share a step by more workers (cluster.workers)",
    r"ObjectStoreFullError": "Ray's object store is full: raise cluster.object_store_mb, or on a cluster of your own "
    "the nodes' --object-store-memory",
    r"OutOfMemory|[Oo]ut of memory|MemoryError|an't allocate memory|annot allocate memory|low on memory": "a worker "
    "was out of memory: lower train.meta_batch_size (or train.batch_size) or validation.tasks, or take nodes with more "
    "memory (cluster.cpus_per_worker decides how many workers share one)",
}
WORKERS_LOST = "its workers were lost once more than cluster.restarts allows, or its nodes are gone"
NO_ENVIRONMENT = r"Failed to set up runtime environment|RuntimeEnvSetupError"
NO_ROOM = r"OutOfDisk|No space left on device"
LOST = (  # Ray's names and words for a worker, a node or a controller that is gone, and for places that did not come
    r"The actor (died unexpectedly|is dead because)|ActorUnavailableError|NodeDiedError|WorkerCrashedError|"
    r"OwnerDiedError|WorkerHealthCheckTimeoutError|WorkerGroupStartup|interrupted by node preemption"
)


def check_finite(learner: Learner, losses: list[Tensor], per_step: int, workers: Workers) -> None:
    """Raise Diverged, on all workers alike, where a loss or the weights are NaN or infinite.

    Args:
        losses: of this worker, one a step, the last one of the step just done.
        per_step: episodes (or images) a step, over all workers.
    """
    finite = torch.isfinite(torch.stack([loss.detach().float() for loss in losses])).cpu().numpy()
    begun = learner.step - len(losses)  # the steps done before the first of them
    own = np.inf if finite.all() else begun + int(np.argmin(finite)) + 1
    firsts = workers.gather(np.asarray([own, float(not _weights_are_finite(learner))]))
    firsts, broken = firsts[: workers.world_size], firsts[workers.world_size :]
    if np.isinf(firsts).all() and not broken.any():
        return
    step = int(min(firsts.min(), learner.step))  # where every loss is finite, the last step broke the weights
    ranks = np.flatnonzero(firsts == step).tolist()
    what = "the loss is NaN or infinite" if ranks else "the weights are NaN or infinite after a finite loss,"
    share = per_step // workers.world_size
    begins = [(step - 1) * per_step + rank * share for rank in ranks or range(workers.world_size)]
    where = ", ".join(f"{begin}..{begin + share - 1}" for begin in begins)
    unit = "images" if learner.method.regime == "classical" else "episodes"
    folder = store.join(learner.config.storage, str(learner.config.name))
    raise Diverged(
        f"{what} in step {step}, with {unit} {where}; the last checkpoint, from before, is kept. See which it is with: "
        f"{command('replay', f'run={folder}', f'step={step}')}; then lower optimizer.lr, or set clip.norm"
    )


def saturation(learner: Learner, loss: float) -> str | None:
    """A line for a run that begins with other weights, whose first loss is far above that of guessing.

    Their distances are not those that the scale of the logits was meant for: a softmax of them is near 0 or 1, wrong as
    often as right, and its gradients undo the weights before anything is learnt.
    """
    config = learner.config
    given = config.initial is not None or config.backbone.get("weights") is not None
    way = config.train.way if isinstance(config.train.way, int) else config.train.way[0]
    chance = math.log(max(way, 2))
    if not given or learner.method.regime == "classical" or "scale" not in config.method or loss < 1.5 * chance:
        return None
    return (
        f"the first loss is {loss:.2f}, that of guessing {chance:.2f}: with the weights that this run begins with, "
        f"method.scale={config.method['scale']} saturates the logits; find a smaller one on validation episodes, or "
        "give method.distance=cosine with method.scale=10 where the method has it"
    )


def still_guessing(learner: Learner, accuracy: float, steps: int, per_step: int) -> str | None:
    """A line for a run that has trained for a while and answers no better than guessing, as some networks do for
    thousands of steps and for ever at another learning rate.

    Args:
        accuracy: the mean in the training episodes of the last ``steps`` steps, ``per_step`` of them each.
    """
    train = learner.config.train
    if learner.method.regime == "classical" or not (isinstance(train.way, int) and isinstance(train.query, int)):
        return None
    chance, answers = 1 / train.way, steps * per_step * train.way * train.query
    if accuracy > chance + 3 * math.sqrt(chance * (1 - chance) / answers):
        return None
    return (
        f"after {learner.step:,} steps the training accuracy is {accuracy:.1%}, that of guessing: try optimizer.lr ten "
        f"times as large or as small (it is {learner.config.optimizer['lr']:g}), and the inner learning rate where the "
        "method has one"
    )


def _weights_are_finite(learner: Learner) -> bool:
    values = [*learner.method.parameters(), *learner.method.buffers()]
    sums = [value.detach().sum().float() for value in values if value.is_floating_point()]
    return bool(torch.isfinite(torch.stack(sums).sum()))


def cause_of(error: Exception, run: Run) -> Exception:
    """The error to raise for one of Ray Train: one line where it is known, else the error as it is."""
    text = str(error)
    found = re.findall(r"(PipelineError|Corrupt|Unavailable): (.+)", text)
    if found:
        kind, line = found[-1]
        return (Unavailable if kind == "Unavailable" else PipelineError)(f"run {run.name}: {line}")
    if beginning := re.search(r"TrainController\.__init__(?s:.)*OSError: (.+)", text):
        line = f"its storage does not answer as it should: {beginning[1]}"
        return Unavailable(f"run {run.name}: {line}; go on with it once it does: {run.resume}")
    if re.search(NO_ENVIRONMENT, text):
        line = "a node could not prepare the job's environment: it was lost meanwhile, or the job's files are gone"
        return Unavailable(f"run {run.name}: {line}; go on with it: {run.resume}")
    if re.search(NO_ROOM, text):
        return Unavailable(f"run {run.name}: {store.disk_full('a node')}; then go on with it: {run.resume}")
    for signs, line in TOO_SMALL.items():
        if re.search(signs, text):
            return PipelineError(f"run {run.name}: {line}; then go on with it: {run.resume}")
    if re.search(LOST, text):
        return Unavailable(f"run {run.name}: {WORKERS_LOST}; go on with it: {run.resume}")
    return error
