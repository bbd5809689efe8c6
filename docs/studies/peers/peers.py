"""Other people's libraries, where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from docs.studies.benchmark.rows import NotHere


class _Empty(ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _NoTorchvision(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def peer(name: str) -> Any:
    """A module of a peer; torchvision is stood in for where it is missing.

    Raises:
        NotHere: the peer is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_NoTorchvision())
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotHere(f"{name} cannot be imported ({error}): see docs/studies/peers/requirements.txt") from error
