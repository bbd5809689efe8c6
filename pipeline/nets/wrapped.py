"""Networks that were not written for this package: those of libraries, and the user's own."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import PipelineError
from pipeline.nets.base import Backbone, Shape
from pipeline.nets.by_name import BUILDS, choose
from pipeline.nets.norm import BatchNorm
from pipeline.nets.trial import tried

Options = dict[str, Any]


def library(backbone: str, package: str) -> Any:
    """A package that is optional, and takes seconds to be imported."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise PipelineError(
            f"backbone={backbone} needs the package {package}: pip install '.[{backbone}]' or {package}"
        ) from error
    except (ImportError, RuntimeError) as error:
        why = next(iter(str(error).splitlines()), "")
        raise PipelineError(f"backbone={backbone}: {package} cannot be imported ({why}); {BUILDS}") from error


class Wrapped(Backbone, ABC):
    """A network from images [N, C, H, W] to features [N, D], which is tried when it is made.

    Frozen stages are not trained; their dropout is off and their batch-norm takes its averages, in training too.

    Args:
        network: the network.
        shape: (C, H, W) of the images.
        weights: of its first weights: "hub" (those that the library names), a file (safetensors, or .pth and .pt that
            hold nothing but tensors) on disk or s3://, or None: as they were drawn. Building it does not read them:
            ``pipeline.weights`` does.
        freeze: "all", "none", or the number of stages, from the input on, that are not trained.
        batch_norm: in training by the "batch", or by its "averages", which stay those of the first weights: the few
            classes of an episode make other statistics than new tasks are answered by.
        spare: parameters that have no part in the features are not trained, instead of being refused in training.

    Subclasses also take ``weights_sha256`` of the file, or of the library's tensors as safetensors (None: not checked;
    a run records it), and ``trained_on``: what the weights were trained on, for model cards and tables.
    """

    first: str | None = "hub"  # where weights are from if nothing is said

    def __init__(
        self,
        network: nn.Module,
        shape: Shape,
        weights: str | None,
        freeze: str | int,
        spare: bool = True,
        batch_norm: str = "batch",
    ) -> None:
        super().__init__()
        self.network, self.weights = network, weights
        self.by_averages = choose("batch_norm", batch_norm, ("batch", "averages")) == "averages"
        self._frozen: list[str] = []
        self.out_features, unused = tried(self, shape, f"backbone {type(network).__name__}")
        self.unused = {name.removeprefix("network.") for name in unused}
        for name, parameter in network.named_parameters():
            if spare and name in self.unused:
                parameter.requires_grad_(False)
        self._frozen = self._freeze(freeze)

    @classmethod
    def settle(cls, options: Mapping[str, Any]) -> Options:
        """The options with all that building needs from elsewhere written down, so that it needs nothing any more."""
        return dict(options)

    @classmethod
    @abstractmethod
    def recipe(cls, options: Mapping[str, Any]) -> Options:
        """The input that the weights were made with: mean, std, size, crop and interpolation, as
        :class:`~pipeline.nets.preprocess.Preprocess` takes them."""

    @classmethod
    def trained_on(cls, options: Mapping[str, Any]) -> str:
        """What the library's own weights were trained on, for people to read."""
        return "unknown images"

    @abstractmethod
    def library_weights(self) -> dict[str, Tensor]:
        """The weights that the library has for this network, by the network's names."""

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in self._frozen:
            self.network.get_submodule(name).eval()
        for module in self.network.modules() if self.by_averages else ():
            if isinstance(module, _BatchNorm | BatchNorm):  # the package's, where a method put it in their place
                module.eval()
        return self

    def stage_parameters(self) -> list[list[str]]:
        """The names of the network's parameters, stage by stage from the input on.

        A stage is an entry of the outermost list or sequence of modules, what comes before that is the first; without
        any, a stage is a direct child.
        """
        todo = [("", self.network)]
        while todo:
            prefix, module = todo.pop(0)
            if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
                return self._around([f"{prefix}{name}." for name, _ in module.named_children()])
            todo += [(f"{prefix}{name}.", child) for name, child in module.named_children()]
        return self._around([f"{name}." for name, _ in self.network.named_children()])

    def _around(self, prefixes: list[str]) -> list[list[str]]:
        """What begins with each of the prefixes, after what comes before the first of them, if there is any."""
        names = [name for name, _ in self.network.named_parameters()]
        first = next((i for i, name in enumerate(names) if name.startswith(tuple(prefixes))), len(names))
        stages = [[name for name in names if name.startswith(prefix)] for prefix in prefixes]
        return [stage for stage in [names[:first], *stages] if stage]

    def _freeze(self, freeze: str | int) -> list[str]:
        """Stop the training of stages; the names of the modules that lie in them whole."""
        if freeze == "none":
            return []
        if freeze == "all":
            self.network.requires_grad_(False)
            return [""]
        stages = self.stage_parameters()
        if not isinstance(freeze, int) or isinstance(freeze, bool) or not 0 <= freeze <= len(stages):
            raise PipelineError(f"freeze={freeze!r}: give all, none, or how many of its {len(stages)} stages")
        names = {name for stage in stages[:freeze] for name in stage}
        for name, parameter in self.network.named_parameters():
            if name in names:
                parameter.requires_grad_(False)
        inside = {p: [name for name, _ in m.named_parameters(prefix=p)] for p, m in self.network.named_modules()}
        return [prefix for prefix, own in inside.items() if own and names.issuperset(own)]
