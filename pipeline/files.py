"""Local files: written whole or not at all, known by SHA-256; JSON; tensors. A registered model carries this file."""

import hashlib
import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomic(path: str | Path, content: Any) -> None:
    """Replace ``path`` by ``content`` (bytes, or a buffer) in one step: a reader sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def create_atomic(path: str | Path, content: Any) -> bool:
    """Write a file whole, unless there is one; whether it was written. Of many who ask at once, one is told so."""
    whole = Path(path).with_name(f".{Path(path).name}.new-{uuid.uuid4().hex}")
    write_atomic(whole, content)
    try:
        os.link(whole, path)  # unlike a renaming, this replaces nothing
    except FileExistsError:
        return False
    except OSError:  # a file system without links: there somebody may see it before it is whole
        try:
            with open(path, "xb") as stream:
                stream.write(content)
        except FileExistsError:
            return False
    finally:
        whole.unlink(missing_ok=True)
    return True


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every program reads: NaN and infinite numbers, which JSON does not have, are null."""
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tensors_to_bytes(tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> bytes:
    """One safetensors file. Tensors that share memory are written apart."""
    from safetensors.torch import save  # here, since it loads PyTorch, and tasks that plan episodes do without

    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, metadata)


def sha256(content: Any) -> str:
    """Of bytes, or of a buffer."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: str | Path) -> str:
    return file_digest(path, "sha256")


def file_digest(path: str | Path, algorithm: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def in_uri(path: str) -> str:
    """A folder's path as a part of the URI of a SQLite file, in which SQLAlchemy reads "%2F" and "?" otherwise."""
    return path.replace("%", "%25").replace("?", "%3F")
