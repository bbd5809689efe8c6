"""The user's code of a network: which files it is, known by their SHA-256, and how they are loaded apart from all else.

A description names code by its digest and never holds it: what is run was given by its path on this machine, was kept
from then, was sent by the process that began the run, or lies beside this package in a registered model.
"""

import ast
import builtins
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import PipelineError
from pipeline.files import sha256, write_atomic

Sources = Mapping[str, str]  # text by the file's path, from the folder that all are in
FOLDER = "own_code"  # beside this package, in a registered model
_PACKAGE = Path(__file__).resolve().parents[1]  # this one
_sent: dict[str, Sources] = {}


def sources_at(path: str) -> Sources:
    """A Python file and what it imports from its own folder, and they in turn. This package is none of it, also where
    the file lies beside it: whatever loads a network has it, and a copy would have other classes under the same names.

    Raises:
        PipelineError: there is no such file, or one of them is no Python.
    """
    entry, found = Path(path), {}
    todo = [entry]
    while todo:
        file = todo.pop()
        name = file.relative_to(entry.parent).as_posix()
        if name in found:
            continue
        try:
            found[name] = file.read_text("utf-8-sig")
            tree = ast.parse(found[name])
        except (OSError, UnicodeError, SyntaxError, ValueError) as error:
            raise PipelineError(f"backbone.path={file}: cannot be read as Python ({error})") from error
        for module in _imported(tree, file, entry.parent):
            if module.resolve() == _PACKAGE:
                continue
            if module.with_suffix(".py").is_file():
                todo.append(module.with_suffix(".py"))
            elif module.is_dir():
                todo += sorted(module.rglob("*.py"))
    if entry.suffix != ".py" or "." in entry.stem:  # a module's name would be another's inside a package
        raise PipelineError(f"backbone.path={path}: a module is a file NAME.py, without another dot: rename it")
    return {entry.name: found[entry.name], **{name: found[name] for name in sorted(found)}}


def digest_of(sources: Sources) -> str:
    """SHA-256 of names and texts; the first is the file that was named."""
    return sha256(json.dumps([next(iter(sources)), sorted(sources.items())]).encode())


def keep(sources: Sources) -> str:
    """Note that this machine's user means this code; its digest."""
    digest = digest_of(sources)
    folder = _kept() / digest
    if not (folder / "sources.json").exists():
        write_atomic(folder / "sources.json", json.dumps(dict(sources)).encode())
    return digest


def send(sources: Sources | None) -> None:
    """Know code that another process of the same run had; None: there is none."""
    if sources is not None:
        _sent[digest_of(sources)] = sources


def find(digest: str, path: str | None = None) -> Sources:
    """The code with this digest.

    Raises:
        PipelineError: it is not here.
    """
    if digest in _sent:
        return _sent[digest]
    places = [_kept(), *(Path(entry) / FOLDER for entry in sys.path)]  # MLflow adds every model's that it loads
    for stored in (place / digest / "sources.json" for place in places):
        if stored.is_file():
            found: Sources = json.loads(stored.read_text("utf-8"))
            if digest_of(found) == digest:
                return found
    if path is not None and os.path.isfile(path):
        found = sources_at(path)
        if digest_of(found) == digest:
            return found
    raise PipelineError(
        f"backbone.path={path}: this model's own code (SHA-256 {digest[:12]}) is not on this machine; bring the file "
        "back as it was, or take the registered model, which carries it (model=models:/NAME/VERSION)"
    )


def known(digest: str, path: str | None = None) -> bool:
    """Whether :func:`find` finds it."""
    try:
        find(digest, path)
    except PipelineError:
        return False
    return True


def outside(sources: Sources) -> set[str]:
    """Top-level names of what the code imports from elsewhere than its folder and Python itself."""
    own = {name.partition("/")[0].removesuffix(".py") for name in sources}
    names: set[str] = set()
    for text in sources.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.partition(".")[0])
    return names - own - set(sys.stdlib_module_names) - {"pipeline"}


def load(sources: Sources) -> ModuleType:
    """The module of the file that was named. Other code under the same names is another module."""
    package = f"own_code_{digest_of(sources)[:16]}"
    if not any(isinstance(finder, _Finder) and finder.package == package for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(package, sources))
    return importlib.import_module(f"{package}.{next(iter(sources)).removesuffix('.py')}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports sources as modules of one package, in which they find each other by the names that they know."""

    def __init__(self, package: str, sources: Sources) -> None:
        self.package, self.sources = package, sources
        self.own = {name.partition("/")[0].removesuffix(".py") for name in sources}

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.package and not fullname.startswith(f"{self.package}."):
            return None
        folder, name = fullname[len(self.package) + 1 :].replace(".", "/"), self._file(fullname)
        if name is None and folder and not any(source.startswith(f"{folder}/") for source in self.sources):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=name, is_package=self.is_package(fullname))

    def is_package(self, fullname: str) -> bool:
        name = self._file(fullname)
        return name is None or name.endswith("__init__.py")

    def get_source(self, fullname: str) -> str:
        name = self._file(fullname)
        return "" if name is None else self.sources[name]

    def exec_module(self, module: ModuleType) -> None:
        def own_import(
            name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
        ) -> ModuleType:
            if level or name.partition(".")[0] not in self.own:
                return builtins.__import__(name, globals, locals, fromlist, level)
            found = builtins.__import__(f"{self.package}.{name}", globals, locals, fromlist or ("__name__",), 0)
            return found if fromlist else sys.modules[f"{self.package}.{name.partition('.')[0]}"]

        name = module.__name__
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": own_import}
        exec(compile(self.get_source(name), self._file(name) or name, "exec"), module.__dict__)

    def _file(self, fullname: str) -> str | None:
        stem = fullname[len(self.package) + 1 :].replace(".", "/")
        names = [f"{stem}.py", f"{stem}/__init__.py"] if stem else ["__init__.py"]
        return next((name for name in names if name in self.sources), None)


def _imported(tree: ast.AST, file: Path, folder: Path) -> Iterator[Path]:
    """Where the modules that a file imports would be, were they in the folder."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield folder / alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            if node.level > len(file.relative_to(folder).parents):
                raise PipelineError(f"backbone.path={file}: imports from outside the folder {folder}")
            base = file.parents[node.level - 1] if node.level else folder
            if node.level and not node.module:
                yield from (base / alias.name for alias in node.names)
            elif node.module:
                yield base / node.module.partition(".")[0]


def _kept() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "meta-training" / "code"
