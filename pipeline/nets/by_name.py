"""From a name in a configuration to a class, and from options to an object."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pipeline.errors import PipelineError
from pipeline.options import check_options

T = TypeVar("T")
MODULE_NAME = re.compile(r"[a-z][a-z0-9_]*")
BUILDS = "if torchvision is of another build than torch, install both from one index"
IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)


def resolve(kind: str, name: object, package: str, base: type[T], foreign_base: type[T] | None = None) -> type[T]:
    """The class that ``name`` stands for.

    A plain name is a module of ``package`` that defines exactly one subclass of ``base``. A name with a dot is the
    import path of the user's own class, which must be a subclass of ``foreign_base`` (by default ``base``).

    Args:
        kind: what is looked for, for messages: "backbone", "method".

    Raises:
        PipelineError: the name is malformed, unknown, or no such class.
    """
    if isinstance(name, str) and IMPORT_PATH.fullmatch(name):
        return _imported(kind, name, foreign_base or base)
    if isinstance(name, str) and MODULE_NAME.fullmatch(name) and name in _modules(package):
        found = _defined(package, name, base)
        if len(found) == 1:
            return found[0]
    known = ", ".join(n for n in _modules(package) if len(_defined(package, n, base)) == 1)
    raise PipelineError(f"unknown {kind} {name!r}: choose one of {known}, or give the import path of your own class")


def construct(
    kind: str, cls: type[T], options: Mapping[str, Any], given: Mapping[str, Any], where: str | None = None
) -> T:
    """``cls(**options)``, with those of ``given`` that the constructor names.

    Args:
        where: the key that holds the options, for messages; None: ``kind``.

    Raises:
        PipelineError: an option that the constructor does not know, a required one that is missing, one of another
            kind than its annotation says, or values that the constructor cannot use.
    """
    parameters = inspect.signature(cls).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = [n for n in names if n not in given]
    unknown = [str(o) for o in options if o in given or (o not in known and not takes_any)]
    if unknown:
        raise PipelineError(
            f"{kind} {cls.__name__} has no option {', '.join(unknown)}: its options are {', '.join(known) or 'none'}"
        )
    arguments = {**{n: v for n, v in given.items() if n in names}, **options}
    missing = [n for n in names if n not in arguments and parameters[n].default is inspect.Parameter.empty]
    if missing:
        raise PipelineError(f"{kind} {cls.__name__} needs {', '.join(missing)}: set it in the configuration")
    check_options(where or kind, cls, options)
    try:
        return cls(**arguments)
    except (TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, MemoryError, ImportError) as error:
        shown = ", ".join(f"{name}={value!r:.60}" for name, value in options.items())
        why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        why += f"; {BUILDS}" if isinstance(error, ImportError) else ""
        raise PipelineError(f"{kind} {cls.__name__} cannot be made with {shown or 'its defaults'} ({why})") from error


def choose(option: str, value: object, known: Mapping[Any, Any] | tuple[Any, ...]) -> Any:
    """``value`` if it is one of ``known``; otherwise a one-line refusal that names them."""
    if isinstance(value, (str, int, type(None))) and value in known:
        return value
    raise PipelineError(f"{option}={value!r} is not known: choose one of {', '.join(map(str, known))}")


def _modules(package: str) -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__))


def _defined(package: str, name: str, base: type[T]) -> list[type[T]]:
    """Subclasses of ``base`` that a module itself defines (not those it imports, nor private or abstract ones)."""
    module = importlib.import_module(f"{package}.{name}")
    public = [c for name, c in vars(module).items() if inspect.isclass(c) and not name.startswith("_")]
    own = [c for c in public if c.__module__ == module.__name__ and not inspect.isabstract(c)]
    return [c for c in own if issubclass(c, base) and c is not base]


def _imported(kind: str, path: str, base: type[T]) -> type[T]:
    module_name, _, class_name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ModuleNotFoundError as error:
        raise PipelineError(f"{kind} {path!r} cannot be imported: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise PipelineError(f"{kind} {path!r} is not a subclass of {base.__module__}.{base.__name__}")
    return found
