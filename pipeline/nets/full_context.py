"""Full-context embeddings: support images that know each other, and queries that know the support (Vinyals 2016)."""

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.functional.attention import attention, lstm_step
from pipeline.functional.precision import in_float32
from pipeline.functional.sequences import reordered
from pipeline.nets.by_name import choose

READINGS = ("concat", "added", "closer", "ravi")


class SupportContext(nn.Module):
    """g: a bidirectional LSTM over the support, g_i = forward_i + backward_i + g'_i (appendix A.2).

    The order of the images matters.

    Args:
        features: D, the width of embeddings and of both LSTMs.
        aligned: false: image i gets the backward state of the i-th image from the end, as in the code of Ravi &
            Larochelle, which does not turn the backward outputs around again.
    """

    def __init__(self, features: int, aligned: bool = True) -> None:
        super().__init__()
        self.forwards = nn.LSTM(features, features, batch_first=True)
        self.backwards = nn.LSTM(features, features, batch_first=True)
        self.aligned = aligned

    @in_float32
    def forward(self, items: Tensor, present: Tensor, shuffle: bool = False) -> Tensor:
        """[T, S, D] in the order in which they are read, or ``shuffle`` them for every task; same shape and order.

        What is not ``present`` [T, S] is passed over.
        """
        draw = torch.rand if shuffle else torch.zeros
        place = draw(present.shape, device=items.device)
        order = place.masked_fill(~present, 2.0).argsort(dim=1, stable=True)
        # Reversed within the images that are there: its own inverse, whatever their number.
        position = torch.arange(items.shape[1], device=items.device)
        back = (present.sum(1, keepdim=True) - 1 - position) % items.shape[1]
        read = reordered(items, order)
        forward, _ = self.forwards(read)
        backward, _ = self.backwards(reordered(read, back))
        found = forward + (reordered(backward, back) if self.aligned else backward) + read
        return reordered(found, order.argsort(1))


class QueryContext(nn.Module):
    """f: an LSTM that reads the support by attention before it answers (appendix A.1, equations 3 to 6).

    With a = softmax(h.g), r = sum_i a_i g_i and h = h' + f'(x), a step is, by ``reading``:

    ``concat``
        h', c = LSTM(f'(x), [h, r], c): the paper's, with a recurrent weight of 4D x 2D.
    ``added``
        h', c = LSTM(f'(x), h + r, c).
    ``closer``
        h', c = LSTM([f'(x), r], h, c), as often as there are support images (Chen et al. 2019).
    ``ravi``
        the same from h = 0 and r = the mean of g (Ravi & Larochelle 2017, three steps).

    Args:
        features: D.
        reading: see above.
        unrolls: number of steps K; "closer" has its own.
    """

    def __init__(self, features: int, reading: str = "concat", unrolls: int = 2) -> None:
        super().__init__()
        self.reading = choose("reading", reading, READINGS)
        if unrolls < 1:
            raise PipelineError(f"unrolls={unrolls} must be at least 1")
        self.unrolls = unrolls
        inputs = 2 * features if reading in ("closer", "ravi") else features
        hidden = 2 * features if reading == "concat" else features
        self.weight_ih, self.weight_hh = _uniform(4 * features, inputs), _uniform(4 * features, hidden)
        self.bias_ih, self.bias_hh = _uniform(4 * features), _uniform(4 * features)

    @in_float32
    def forward(self, queries: Tensor, items: Tensor, present: Tensor) -> Tensor:
        """Queries [T, Q, D] that have read the support [T, S, D], of which the ``present`` [T, S] count: [T, Q, D]."""
        from_nothing, reads_inputs = self.reading == "ravi", self.reading in ("closer", "ravi")
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        h = torch.zeros_like(queries) if from_nothing else queries
        cell = torch.zeros_like(queries)
        unrolls = present.sum(1).view(-1, 1, 1)  # of "closer": a task's own, whatever it is padded to
        for step in range(items.shape[1] if self.reading == "closer" else self.unrolls):
            if from_nothing and step == 0:
                weight = present.to(items.dtype)
                r = (weight / weight.sum(1, keepdim=True)).unsqueeze(1) @ items
                r = r.expand_as(queries)
            else:
                r = attention(h @ items.mT, present) @ items
            if reads_inputs:
                hidden, kept = lstm_step(torch.cat([queries, r], -1), h, cell, *weights)
            else:
                state = torch.cat([h, r], -1) if self.reading == "concat" else h + r
                hidden, kept = lstm_step(queries, state, cell, *weights)
            if self.reading == "closer":
                h, cell = (hidden + queries).where(step < unrolls, h), kept.where(step < unrolls, cell)
            else:
                h, cell = hidden + queries, kept
        return h


def _uniform(rows: int, *columns: int) -> nn.Parameter:
    """As PyTorch's LSTM: uniform within 1/sqrt(D), for rows = 4D."""
    bound = (rows / 4) ** -0.5
    return nn.Parameter(torch.empty(rows, *columns).uniform_(-bound, bound))
