"""How much the query loss after every inner step counts (MAML++, Antoniou, Edwards & Storkey 2019, section 4)."""

from __future__ import annotations

FLOOR = 0.03  # what a step but the last keeps at least, times 1 / steps


def step_weights(steps: int, epoch: int, epochs: int) -> list[float]:
    """v_s of the losses after inner steps 1..``steps``, which sum to 1 (equation 4, annealed as the official code).

    At epoch 0 all are equal. In ``epochs`` epochs those before the last fall linearly, to no less than ``FLOOR`` /
    ``steps``, and the last takes what they lose.
    """
    fallen = epoch / (steps * epochs)
    early = max(1 / steps - fallen, FLOOR / steps)
    last = min(1 / steps + fallen * (steps - 1), 1 - (steps - 1) * FLOOR / steps)
    return [early] * (steps - 1) + [last]
