"""A simple neural attentive meta-learner (Mishra, Rohaninejad, Chen & Abbeel 2018)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.functional.losses import PADDING
from pipeline.functional.prototypes import one_hot
from pipeline.functional.sequences import reordered, sequence_order
from pipeline.methods.base import State
from pipeline.methods.head import HeadMethod
from pipeline.nets.snail_blocks import SnailNetwork


class Snail(HeadMethod):
    """A task is a sequence: the support images with their labels in random order, then one query without a label, whose
    class a causal network predicts at that last position (section 4.1).

    Every query has a sequence of its own. As their support is the same, and as it cannot see what follows it, the
    support is computed once a task and every query as a last position: the same numbers as from whole sequences.
    In evaluation the support's order is a fixed permutation.

    Args:
        backbone: the embedding: conv4 for Omniglot, snail_resnet for mini-ImageNet.
        way: number of classes, the width of labels and answer.
        shot: largest number of support images a class in training. It decides the depth: a TC block sees way * shot + 1
            positions. Support sets of other sizes are answered for as well, though the network has not seen any.
        filters: of every dense block.
        attention: [key size, value size] of every attention block.
        repo_softmax: normalise attention over the queries instead of the keys, the mistake of a re-implementation that
            is often quoted. There every position depends on those after it, so that each query needs its whole
            sequence. The published 55.71 / 68.88 on mini-ImageNet and 99.07 / 99.78 / 97.64 / 99.36 on Omniglot are
            the authors', whose equation has the keys.
    """

    joint_forward = True

    def __init__(
        self,
        backbone: nn.Module,
        way: int,
        shot: int,
        filters: int = 128,
        attention: Sequence[Sequence[int]] = ((64, 32), (256, 128), (512, 256)),
        repo_softmax: bool = False,
    ) -> None:
        super().__init__(backbone)
        if not attention or any(len(sizes) != 2 for sizes in attention):
            raise PipelineError(f"attention={list(attention)}: give [key size, value size] for every attention block")
        self.fixed_way, self.repo_softmax = way, repo_softmax
        channels = self.width + way
        over = "queries" if repo_softmax else "keys"
        self.network = SnailNetwork(channels, way * shot + 1, way, attention, filters, over)

    def fit(self, features: Tensor, labels: Tensor, way: int) -> State:
        """What the network remembers of the support sequence; with ``repo_softmax`` the sequence itself."""
        order = sequence_order(labels, shuffle=self.training, padding_first=True)
        features, labels = reordered(features, order), labels.gather(1, order)
        present = labels != PADDING
        items = torch.cat([features * present.unsqueeze(-1), one_hot(labels, way, features.dtype)], dim=-1)
        if self.repo_softmax:
            return {"sequence": items, "present": present}
        return self.network.remember(items, present)

    def scores(self, state: State, query: Tensor) -> Tensor:
        """The answers at the last position."""
        assert self.fixed_way is not None
        items = F.pad(query, (0, self.fixed_way))
        if not self.repo_softmax:
            return self.network.last(items, state)
        return self._whole_sequences(state["sequence"], state["present"], items)

    def _whole_sequences(self, support: Tensor, present: Tensor, items: Tensor) -> Tensor:
        """[T, S, C] followed by each of [T, Q, C] to the answers at the last positions [T, Q, way]."""
        queries = items.shape[1]
        sequences = torch.cat([support.unsqueeze(1).expand(-1, queries, -1, -1), items.unsqueeze(2)], dim=2)
        present = F.pad(present, (0, 1), value=True).unsqueeze(1).expand(-1, queries, -1)
        return self.network(sequences.flatten(0, 1), present.flatten(0, 1))[:, -1].unflatten(0, items.shape[:2])
