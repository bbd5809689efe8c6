"""What methods share that give every task its own weights: a backbone and a linear head as functions of them."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.functional.flat import Shapes
from pipeline.functional.inner_loop import Parameters, loop_tasks, part, vmap_tasks
from pipeline.methods.base import Method, State
from pipeline.nets.by_name import choose
from pipeline.nets.norm import always_by_the_batch, batch_norms, fixed_statistics, recorded_statistics
from pipeline.nets.transforms import differentiable_attention
from pipeline.nets.trial import mappable

STATISTICS = "statistics."


def at_least_one(**options: int) -> None:
    """Refuse an option below 1 by its name."""
    for name, value in options.items():
        if value < 1:
            raise PipelineError(f"{name}={value}: there is at least one")


class _FastWeights(Method):
    """A state is the adapted weights [T, ...] by name and, under "statistics.", what batch-norm is to use with them.

    Args:
        backbone: the features; its batch-norm layers never use running averages here.
        way: number of classes, the width of the linear head.
        inner_loop: "loop" over tasks, "vmap" over all at once, or "auto", which looks at shapes and device only. On CPU
            per-task weights make convolutions grouped and slow: there it loops, except where a task is so small (five
            28x28 images and strided convolutions) that the loop's own cost is larger. On CUDA and without convolutions
            it takes vmap, unless vmap cannot map the network.
    """

    task_by_task = True
    few_values = 200_000  # of a task's hidden maps; about where the loop overtakes vmap on CPU (measured)

    def __init__(self, backbone: nn.Module, way: int, inner_loop: str = "auto") -> None:
        super().__init__(backbone)
        always_by_the_batch(backbone)
        self.head = nn.Linear(self.width, way)
        self.fixed_way = way
        self.inner_loop = choose("inner_loop", inner_loop, ("auto", "loop", "vmap"))
        self._convolutional = any(isinstance(m, nn.modules.conv._ConvNd) for m in backbone.modules())
        self._hidden: dict[torch.Size, int] = {}  # values of an image's hidden maps, by its shape
        self._mappable: bool | None = None  # by vmap; None: not tried yet

    def begun_elsewhere(self, drawn: Collection[str]) -> None:
        """A head that did not come with the features begins at zero.

        A first inner step then makes every class's row the mean of its features less that of all. A drawn head instead
        answers trained features at random and with confidence, and a few steps do not undo that: on 20 classes of
        Omniglot, begun with classical features, 37 % at the best inner rate, and 79 % from zero.
        """
        if "head.weight" in drawn:
            for parameter in self.head.parameters():
                nn.init.zeros_(parameter)

    def classify(self, state: State, query: Tensor) -> Tensor:
        return self._each_task(query)(self._classify_one, state, query)

    def _classify_one(self, state: State, query: Tensor) -> Tensor:
        """One task: logits [Q, way] of queries [Q, C, H, W]."""
        parameters = {**dict(self.named_parameters()), **state}
        fixed = part(state, STATISTICS)
        with fixed_statistics(self.backbone, fixed) if fixed else nullcontext():
            return self._logits(parameters, query)

    @contextmanager
    def _recording(self, state: State, values: dict[str, int] | None = None) -> Iterator[None]:
        """Within: the batch-norm statistics of the images that are seen go into ``state``, for its queries."""
        with recorded_statistics(self.backbone, values) as statistics:
            yield
        state.update({STATISTICS + name: value for name, value in statistics.items()})

    def _statistics(self, parameters: Parameters, support: Tensor) -> State:
        """One task: what the queries need of the batch-norm statistics of its support [S, C, H, W]."""
        found: State = {}
        with self._recording(found):
            self._features(parameters, support)
        return found

    def _logits(self, parameters: Parameters, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, way] with the given parameters."""
        return self._head(parameters, self._features(parameters, images))

    def _features(self, parameters: Parameters, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, D] with the given parameters in the backbone."""
        with differentiable_attention():
            return torch.func.functional_call(self.backbone, part(parameters, "backbone."), (images,))

    def _head(self, parameters: Parameters, features: Tensor) -> Tensor:
        return F.linear(features, parameters["head.weight"], parameters["head.bias"])

    def _weights(self) -> Parameters:
        """The weights that tasks start from: the parameters of backbone and head."""
        return {n: p for n, p in self.named_parameters() if n.startswith(("backbone.", "head."))}

    def _shapes(self) -> Shapes:
        return {name: parameter.shape for name, parameter in self._weights().items()}

    def _each_task(self, images: Tensor) -> Callable[..., Any]:
        """What maps a function of one task over all tasks, on the device of ``images`` [T, ...]."""
        if self.inner_loop == "auto":
            grouped_is_slow = self._convolutional and not images.is_cuda and self._many_values(images)
            if grouped_is_slow:
                return loop_tasks
            return vmap_tasks if self._by_vmap(images) else loop_tasks
        return vmap_tasks if self.inner_loop == "vmap" else loop_tasks

    def _by_vmap(self, images: Tensor) -> bool:
        """Whether vmap can map the network over ``images`` [..., C, H, W]."""
        if self._mappable is None:
            self._mappable = mappable(self.backbone, images)
        return self._mappable

    def _many_values(self, images: Tensor) -> bool:
        """Whether the hidden maps of a task's images [T, N, C, H, W] are too large for grouped convolutions."""
        if not self.few_values:
            return True
        shape = images.shape[2:]
        if shape not in self._hidden:
            self._hidden[shape] = hidden_values(self.backbone, images)
        return images.shape[1] * self._hidden[shape] > self.few_values


def hidden_values(network: nn.Module, images: Tensor) -> int:
    """How many values the convolutions of ``network`` put out for one of ``images`` [..., C, H, W].

    The network sees a black image, without its batch-norm, whose weights may be those of other inner steps; no random
    number is taken from the run's.
    """
    found = []

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found.append(output[0].numel())

    convolutions = [m for m in network.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    hooks = [module.register_forward_hook(count) for module in convolutions]
    norms = batch_norms(network).values()
    for norm in norms:
        norm.forward = nn.Identity().forward  # type: ignore[method-assign,assignment]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            network(images.new_zeros(1, *images.shape[-3:]))
    finally:
        for hook in hooks:
            hook.remove()
        for norm in norms:
            del norm.forward
    return sum(found)
