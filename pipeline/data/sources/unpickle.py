"""Pickles of arrays, read without running any code of theirs.

The archives of CIFAR-100 and mini-ImageNet are pickles: programs that may call any function. Here a pickle may build
plain containers, numbers, text and NumPy arrays of plain numbers. Whatever else it names is refused by that name, and
even NumPy's own constructors are replaced: an array's bytes are taken as data and checked against its shape.
"""

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.errors import PipelineError

_DTYPES = frozenset({"u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "b1"})


class _Refused(Exception):
    pass


class _DType:
    """Stands for a pickled ``numpy.dtype``."""

    def __init__(self, spec: Any, *_: Any) -> None:
        self.spec = spec.decode("ascii") if isinstance(spec, bytes) else str(spec)
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        self.order = order.decode("ascii") if isinstance(order, bytes) else str(order)

    def numpy(self) -> np.dtype[Any]:
        if self.spec not in _DTYPES or self.order not in ("<", ">", "|", "="):
            raise _Refused(f"an array of type {self.spec!r}")
        return np.dtype(("" if self.order in "|=" else self.order) + self.spec)


class _Array:
    """Stands for a pickled ``numpy.ndarray`` until its bytes are checked."""

    state: tuple[Any, ...] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def numpy(self) -> np.ndarray:
        if self.state is None:
            raise _Refused("an array without content")
        _, shape, dtype, fortran, content = self.state
        return _array(content, dtype, shape, "F" if fortran else "C")


def _array(content: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if isinstance(content, str):  # Python 2 wrote bytes as text
        content = content.encode("latin1")
    if not isinstance(dtype, _DType) or not isinstance(content, bytes | bytearray):
        raise _Refused("an array of Python objects")
    kind = dtype.numpy()
    if not all(isinstance(n, int) and n >= 0 for n in shape) or math.prod(shape) * kind.itemsize != len(content):
        raise _Refused("an array whose bytes do not match its shape")
    return np.frombuffer(content, dtype=kind).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise _Refused(f"text in {encoding!r}")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
}
for _core in ("numpy.core", "numpy._core"):
    _ADMITTED[f"{_core}.multiarray", "_reconstruct"] = lambda *_: _Array()
    _ADMITTED[f"{_core}.multiarray", "scalar"] = lambda dtype, content=b"": _array(content, dtype, (), "C").item()
    _ADMITTED[f"{_core}.numeric", "_frombuffer"] = _array


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _Refused(ascii(f"{module}.{name}")[1:-1]) from None


def read_arrays(stream: io.BufferedIOBase | io.BytesIO, where: str) -> Any:
    """The plain containers and arrays of a pickle; text and bytes keys become ``str``.

    Raises PipelineError, naming ``where`` and what was asked for, when the pickle holds anything else.
    """
    try:
        return _plain(_Unpickler(stream, encoding="bytes").load())
    except _Refused as refusal:
        raise PipelineError(f"{where} is refused: its pickle asks for {refusal}, which is no plain data") from None
    except Exception as error:  # a hostile pickle can fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise PipelineError(f"{where} is not a readable pickle ({reason}); fetch it again") from error


def _plain(tree: Any, depth: int = 0) -> Any:
    if depth > 20:
        raise _Refused("containers nested too deeply")
    if isinstance(tree, _Array):
        return tree.numpy()
    if isinstance(tree, dict):
        return {_text(key): _plain(value, depth + 1) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        if all(isinstance(value, int) for value in tree):  # long lists of labels, as they are
            return list(tree)
        return [_plain(value, depth + 1) for value in tree]
    if isinstance(tree, bytes):
        return _text(tree)
    if isinstance(tree, _DType):
        raise _Refused("a type without an array")
    return tree


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
