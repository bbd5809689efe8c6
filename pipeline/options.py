"""Whether options are of the kinds that a constructor's annotations name: what Hydra and YAML read as text, as "off"
and "1e-3", is true in Python, or fails where it is first counted with.

Written by hand, since a registered model carries this without pydantic, whose words the refusals have.
"""

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Any, Union, get_args, get_origin, get_type_hints

from pipeline.errors import PipelineError

WORDS: dict[Any, str] = {
    bool: "a valid boolean",
    int: "a valid integer",
    float: "a valid number",
    str: "a valid string",
    type(None): "null",
}
LISTS, MAPPINGS = (list, tuple, Sequence), (dict, Mapping)


def check_options(where: str, called: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse, as ``where.option=value``, what does not fit the annotations of a function or of a class's constructor.

    An option without annotation is not checked, nor one whose annotation names other types than YAML has, cannot be
    read, or does not fit its own default.
    """
    function = called.__init__ if inspect.isclass(called) else called
    try:
        kinds, parameters = get_type_hints(function), inspect.signature(function).parameters
    except Exception:  # the user's own annotations, which may be of what is imported for type checkers alone
        return
    for name, value in options.items():
        kind = kinds.get(name, Any)
        if name not in parameters or parameters[name].kind is inspect.Parameter.VAR_KEYWORD or fits(value, kind):
            continue
        default = parameters[name].default
        if default is inspect.Parameter.empty or fits(default, kind):
            raise PipelineError(f"{where}.{name}={value!r:.60}: input should be {_words(kind)}{_hint(value)}")


def fits(value: object, kind: Any) -> bool:
    """Whether a value of YAML's is of a kind, as an annotation names it. An integer is a number, and 0 and 1 are true
    and false; true is no number. A list is any sequence."""
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is bool:
        return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))
    if origin in (int, float):
        return isinstance(value, Integral if origin is int else Real) and not isinstance(value, bool)
    if origin is str:
        return isinstance(value, str | PathLike)
    if origin in (None, type(None)):
        return value is None
    if origin in LISTS:
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and parts and parts[-1] is not Ellipsis:
            return len(value) == len(parts) and all(map(fits, value, parts))
        return not parts or all(fits(entry, parts[0]) for entry in value)
    if origin in MAPPINGS:
        pairs = value.items() if isinstance(value, Mapping) else ()
        return isinstance(value, Mapping) and all(not parts or all(map(fits, pair, parts)) for pair in pairs)
    return getattr(origin, "__name__", "") != "Tensor"  # which no configuration holds; of others it is not known


def _words(kind: Any) -> str:
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(part) for part in parts if getattr(part, "__name__", "") != "Tensor"))
    if origin in LISTS:
        many = f" of {len(parts)}" if origin is tuple and parts and parts[-1] is not Ellipsis else ""
        return f"a valid list{many}" + (f", each entry {_words(parts[0])}" if parts else "")
    if origin in MAPPINGS:
        return "a valid dictionary" + (f", each value {_words(parts[1])}" if parts and parts[1] is not Any else "")
    return WORDS.get(origin, getattr(origin, "__name__", str(origin)))


def _hint(value: object) -> str:
    try:
        float(value if isinstance(value, str) else "")
    except ValueError:
        return ""
    return "; this is text: without quotes, and with a point before an exponent (1.0e-3), YAML reads a number"
