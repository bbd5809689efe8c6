"""Layers that have fast weights beside their slow ones (Munkhdalai & Yu 2017: layer augmentation)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nets.base import Shape

# Of every layer: its inputs as columns [N, K, L], and their product with the weights
Tape = list[tuple[Tensor, Tensor]]


class FastLayers(nn.Module):
    """3x3 convolutions with ReLU and 2x2 max-pooling, a linear layer, and perhaps one more for answers.

    No layer has a bias or a normalisation, so that the gradient of an image's loss is that image's own. Weights are
    matrices [O, K]; those of convolutions are over the K values that the kernel sees at one of L positions.

    Args:
        map_shape: (C, H, W) of the input.
        convolutions: how many.
        filters: of every convolution.
        hidden: width of the linear layer; None: as many as it has inputs.
        outputs: width of the last layer; None: there is none.
    """

    def __init__(
        self, map_shape: Shape, convolutions: int, filters: int, hidden: int | None = None, outputs: int | None = None
    ) -> None:
        super().__init__()
        channels, *size = map_shape
        self.convs = nn.ModuleList()
        for _ in range(convolutions):
            self.convs.append(nn.Conv2d(channels, filters, 3, padding=1, bias=False))
            channels, size = filters, [(s + 1) // 2 for s in size]
        inputs = channels * size[0] * size[1]
        self.out_features = inputs if hidden is None else hidden
        self.hidden = nn.Linear(inputs, self.out_features, bias=False)
        self.output = None if outputs is None else nn.Linear(self.out_features, outputs, bias=False)

    def weights(self) -> list[Tensor]:
        """The slow weights [O, K] of every layer in turn."""
        layers = [*self.convs, self.hidden, *([] if self.output is None else [self.output])]
        return [layer.weight.flatten(1) for layer in layers]

    def slow(self, maps: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tape]:
        """With slow weights alone, as given (detached, perhaps).

        Args:
            maps: [N, C, H, W].

        Returns:
            the representation [N, D], which is the linear layer's output before its ReLU; the answers [N, outputs], if
            there are any; and for every layer its inputs and their product with the weights: the gradient of an image's
            loss for the weights is the gradient for the product times the inputs.
        """
        x, tape = maps, Tape()
        for weight in weights[: len(self.convs)]:
            product = _track(F.conv2d(x, weight.view(len(weight), -1, 3, 3), padding=1))
            tape.append((_columns(x), product.flatten(2)))
            x = _pool(F.relu(tape[-1][1].view_as(product)))
        x, answers = x.flatten(1), None
        for weight in weights[len(self.convs) :]:
            product = _track(x @ weight.mT)
            tape.append((x.unsqueeze(-1), product.unsqueeze(-1)))
            x = F.relu(tape[-1][1].squeeze(-1))
        representation = tape[len(self.convs)][1].squeeze(-1)
        if self.output is not None:
            answers = tape[-1][1].squeeze(-1)
        return representation, answers, tape

    def forward(self, maps: Tensor, fast: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """With slow weights W and fast weights W*: relu(W x) + relu(W* x), and W x + W* x at the end.

        Args:
            maps: [G, M, C, H, W], M images in each of G groups.
            fast: [G, O, K] of every layer in turn; those of the last may be missing.

        Returns:
            the representation [G, M, D], and the answers [G, M, outputs] where there are fast weights for them.
        """
        groups = maps.shape[:2]
        x = maps.flatten(0, 1)
        for conv, weight in zip(self.convs, fast, strict=False):
            slow = conv(x)
            x = _pool(F.relu(slow) + F.relu(_product(weight, _columns(x)).view_as(slow)))
        x = x.flatten(1)
        hidden, *last = fast[len(self.convs) :]
        slow, also = self.hidden(x), _product(hidden, x.unsqueeze(-1)).squeeze(-1)
        representation, answers = (slow + also).unflatten(0, groups), None
        if last:
            assert self.output is not None
            x = F.relu(slow) + F.relu(also)
            answers = self.output(x) + _product(last[0], x.unsqueeze(-1)).squeeze(-1)
            answers = answers.unflatten(0, groups)
        return representation, answers


def _track(product: Tensor) -> Tensor:
    """A leaf that gradients can be taken at, where nothing before it is one."""
    return product if product.requires_grad else product.requires_grad_()


def _columns(x: Tensor) -> Tensor:
    """[N, C, H, W] to what a 3x3 kernel sees, [N, 9 C, H W]."""
    return F.unfold(x, 3, padding=1)


def _pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2, ceil_mode=True)


def _product(weights: Tensor, columns: Tensor) -> Tensor:
    """[G, O, K] times the columns [G * M, K, L] of M items in every group: [G * M, O, L]."""
    groups = columns.unflatten(0, (len(weights), -1)).transpose(1, 2)  # [G, K, M, L]
    product = weights @ groups.flatten(2)
    return product.unflatten(2, groups.shape[2:]).transpose(1, 2).flatten(0, 1)
