"""A loss that is no number: noticed before anything of it is saved, and told with the episodes that it came with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import Diverged
from pipeline.training.learner import Learner

if TYPE_CHECKING:
    from pipeline.training.loop import Workers


def check_finite(learner: Learner, losses: list[Tensor], per_step: int, workers: Workers) -> None:
    """Raise Diverged, on all workers alike, where a loss or the weights are no numbers.

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
    step = int(min(firsts.min(), learner.step))  # where every loss is a number, the last step broke the weights
    ranks = np.flatnonzero(firsts == step).tolist()
    what = "the loss is no number" if ranks else "the weights are no numbers after a loss that is one,"
    share = per_step // workers.world_size
    begins = [(step - 1) * per_step + rank * share for rank in ranks or range(workers.world_size)]
    where = ", ".join(f"{begin}..{begin + share - 1}" for begin in begins)
    unit = "images" if learner.method.regime == "classical" else "episodes"
    raise Diverged(
        f"{what} in step {step}, with {unit} {where}; the last checkpoint, from before, is kept. See which it is with: "
        f"python -m jobs.replay run={learner.config.name} step={step}; then lower optimizer.lr, or set clip.norm"
    )


def _weights_are_finite(learner: Learner) -> bool:
    values = [*learner.method.parameters(), *learner.method.buffers()]
    sums = [value.detach().sum().float() for value in values if value.is_floating_point()]
    return bool(torch.isfinite(torch.stack(sums).sum()))
