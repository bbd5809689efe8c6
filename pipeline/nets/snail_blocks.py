"""The blocks of SNAIL (Mishra, Rohaninejad, Chen & Abbeel 2018): temporal convolutions and causal attention.

Every block maps a sequence [T, N, C] to one with more channels, its input among them. As a position depends only on
those before it, a sequence that is followed by one of many last items is computed once: ``remember`` returns what a
last item needs of it, and ``last`` computes the last items alone.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.functional.inner_loop import part
from pipeline.functional.sequences import causal_attention, gated_units, last_attention
from pipeline.nets.by_name import choose

Memory = dict[str, Tensor]  # every tensor leads with the tasks [T, ...]


class DenseBlock(nn.Module):
    """x and tanh(filter) * sigmoid(gate) of causal convolutions with kernel 2 over it (section 3.1).

    Args:
        channels: C of the input.
        dilation: how many positions apart the two that the kernel sees.
        filters: channels that are added.
    """

    def __init__(self, channels: int, dilation: int, filters: int) -> None:
        super().__init__()
        self.dilation, self.channels = dilation, channels + filters
        self.units = nn.Linear(2 * channels, 2 * filters)

    def forward(self, x: Tensor, present: Tensor, memory: Memory | None = None) -> Tensor:
        """[T, N, C] to [T, N, C + filters]; positions that are not ``present`` [T, N] are zero, as before the first."""
        earlier = F.pad(x, (0, 0, self.dilation, 0))[:, : x.shape[1]]
        added = gated_units(earlier, x, self.units.weight, self.units.bias)
        return torch.cat([x, added * present.unsqueeze(-1)], dim=-1)

    def remember(self, x: Tensor) -> Memory:
        before = x.shape[1] - self.dilation
        return {"seen": x[:, before] if before >= 0 else torch.zeros_like(x[:, 0])}

    def last(self, x: Tensor, memory: Memory, present: Tensor) -> Tensor:
        earlier = memory["seen"].unsqueeze(1).expand_as(x)
        return torch.cat([x, gated_units(earlier, x, self.units.weight, self.units.bias)], dim=-1)


class AttentionBlock(nn.Module):
    """x and what causal attention reads for every position (section 3.1).

    Args:
        channels: C of the input.
        key_size, value_size: of the attention; ``value_size`` channels are added.
        over: see :func:`pipeline.functional.sequences.causal_attention`.
    """

    def __init__(self, channels: int, key_size: int, value_size: int, over: str = "keys") -> None:
        super().__init__()
        self.over, self.channels = over, channels + value_size
        self.query, self.key = nn.Linear(channels, key_size), nn.Linear(channels, key_size)
        self.value = nn.Linear(channels, value_size)

    def forward(self, x: Tensor, present: Tensor, memory: Memory | None = None) -> Tensor:
        """[T, N, C] to [T, N, C + value size]; ``memory`` is what :meth:`remember` makes of x."""
        memory = self.remember(x) if memory is None else memory
        read = causal_attention(self.query(x), memory["keys"], memory["values"], present, self.over)
        return torch.cat([x, read * present.unsqueeze(-1)], dim=-1)

    def remember(self, x: Tensor) -> Memory:
        return {"keys": self.key(x), "values": self.value(x)}

    def last(self, x: Tensor, memory: Memory, present: Tensor) -> Tensor:
        own = self.query(x), self.key(x), self.value(x)
        return torch.cat([x, last_attention(*own, memory["keys"], memory["values"], present)], dim=-1)


class SnailNetwork(nn.Module):
    """Attention blocks with TC blocks between them, and a linear layer (section 5.1).

    A TC block for sequences of length L is ceil(log2 L) dense blocks with dilations 2, 4, 8, ... (section 3.1).

    Args:
        channels: C of the items.
        length: L.
        outputs: of the linear layer.
        attention: [key size, value size] of every attention block.
        filters: of every dense block.
        over: see :func:`pipeline.functional.sequences.causal_attention`.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        outputs: int,
        attention: Sequence[Sequence[int]] = ((64, 32), (256, 128), (512, 256)),
        filters: int = 128,
        over: str = "keys",
    ) -> None:
        super().__init__()
        choose("over", over, ("keys", "queries"))
        self.blocks = nn.ModuleList()
        for number, (key_size, value_size) in enumerate(attention):
            if number:
                for dilation in dilations(length):
                    self.blocks.append(DenseBlock(channels, dilation, filters))
                    channels += filters
            self.blocks.append(AttentionBlock(channels, key_size, value_size, over))
            channels += value_size
        self.linear = nn.Linear(channels, outputs)

    def forward(self, sequence: Tensor, present: Tensor | None = None) -> Tensor:
        """[T, N, C] to [T, N, outputs], every position after those before it.

        ``present`` bool [T, N]: which positions are items. The others have to be zero and to come first.
        """
        x, present = sequence, _all_present(sequence) if present is None else present
        for block in self.blocks:
            x = block(x, present)
        return self.linear(x)

    def remember(self, sequence: Tensor, present: Tensor | None = None) -> Memory:
        """What an item after ``sequence`` [T, S, C] needs of it."""
        x, present = sequence, _all_present(sequence) if present is None else present
        memory: Memory = {"present": present}
        for number, block in enumerate(self.blocks):
            own = block.remember(x)  # type: ignore[operator]
            memory |= {f"{number}.{name}": value for name, value in own.items()}
            if number < len(self.blocks) - 1:  # a last item sees what the last block is given, not what it makes of it
                x = block(x, present, own)
        return memory

    def last(self, items: Tensor, memory: Memory) -> Tensor:
        """[T, Q, C] to [T, Q, outputs]: every item as the last of a sequence of its own after what is remembered."""
        x = items
        for number, block in enumerate(self.blocks):
            x = block.last(x, part(memory, f"{number}."), memory["present"])  # type: ignore[operator]
        return self.linear(x)


def dilations(length: int) -> Iterator[int]:
    """2, 4, 8, ... of the dense blocks that a TC block needs to see all of ``length`` positions."""
    return (2 ** (i + 1) for i in range(math.ceil(math.log2(length))))


def _all_present(sequence: Tensor) -> Tensor:
    return torch.ones(sequence.shape[:2], dtype=torch.bool, device=sequence.device)
