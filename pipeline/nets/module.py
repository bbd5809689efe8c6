"""A network of one's own, from a Python file."""

import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.nets import own_code
from pipeline.nets.base import Shape
from pipeline.nets.by_name import construct
from pipeline.nets.wrapped import Options, Wrapped


class OwnModule(Wrapped):
    """A ``torch.nn.Module`` in a file anywhere, which maps images [N, C, H, W] to features [N, D]; D is found out.

    What the file imports from its own folder belongs to it. Its constructor gets ``options``, and where it takes them
    ``shape`` (C, H, W) too.

    Args:
        path: the Python file.
        model: the name of the class; None: the only module that the file itself defines.
        options: arguments of its constructor.
        weights, weights_sha256, trained_on, freeze: see :class:`Wrapped`; there is no "hub".
        code_sha256: of the code; None: not checked. A run records it, and runs no other.
    """

    first = None

    def __init__(
        self,
        shape: Shape,
        path: str | None = None,
        model: str | None = None,
        options: Mapping[str, Any] | None = None,
        weights: str | None = None,
        weights_sha256: str | None = None,
        trained_on: str | None = None,
        freeze: str | int = "none",
        code_sha256: str | None = None,
    ) -> None:
        sources = own_code.find(code_sha256, path) if code_sha256 is not None else own_code.sources_at(_given(path))
        given = {"shape": shape}
        network = construct("backbone", _class(sources, model), dict(options or {}), given, "backbone.options")
        super().__init__(network, shape, weights, freeze, spare=False)
        said = getattr(network, "out_features", None)
        if isinstance(said, int) and said != self.out_features:
            raise PipelineError(
                f"backbone {type(network).__name__} says out_features={said}, but returns {self.out_features} features"
            )

    @classmethod
    def settle(cls, options: Mapping[str, Any]) -> Options:
        if options.get("code_sha256") is not None:
            return dict(options)
        sources = own_code.sources_at(_given(options.get("path")))
        model = _class(sources, options.get("model")).__name__
        return {**options, "model": model, "code_sha256": own_code.keep(sources)}

    @classmethod
    def recipe(cls, options: Mapping[str, Any]) -> Options:
        raise PipelineError("input.scaling=backbone: a network of one's own has no recipe; give unit or standard")

    def library_weights(self) -> dict[str, Tensor]:
        raise PipelineError("backbone.weights=hub: a network of one's own is on no hub; give a file, or null")


def _given(path: str | None) -> str:
    if path is None:
        raise PipelineError("backbone.path must be given: the Python file of the network")
    return path


def _class(sources: own_code.Sources, name: str | None) -> type[nn.Module]:
    file = next(iter(sources))
    try:
        module: ModuleType = own_code.load(sources)
    except Exception as error:  # the user's code: of any kind
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise PipelineError(f"backbone.path={file}: cannot be imported ({why})") from error
    known = {
        n: c for n, c in vars(module).items()
        if inspect.isclass(c) and issubclass(c, nn.Module) and c.__module__ == module.__name__
    }  # fmt: skip
    if name is None and len(known) == 1:
        return next(iter(known.values()))
    if name is None or not (inspect.isclass(found := getattr(module, name, None)) and issubclass(found, nn.Module)):
        raise PipelineError(
            f"backbone.model={name}: give the class of {file} that is the network: {', '.join(known) or 'it has none'}"
        )
    return found
