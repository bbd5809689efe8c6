"""Folders on a local disk or in an object store, behind one small interface."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlparse

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import PipelineError


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def open_store(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a folder and the folder's path on it.

    ``uri`` is a local path or ``s3://bucket/prefix``. Endpoint and credentials of S3 come from the standard
    environment variables (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ...) or the machine's role.
    """
    if not is_remote(uri):
        return pafs.LocalFileSystem(), os.path.abspath(uri.removeprefix("file://"))
    parsed = urlparse(uri)
    if parsed.scheme != "s3" or not parsed.netloc:
        raise PipelineError(f"{uri!r} is no folder this pipeline reads: give a local path or s3://bucket/prefix")
    path = f"{parsed.netloc}{parsed.path}".rstrip("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        scheme, _, host = endpoint.partition("://")
        return pafs.S3FileSystem(endpoint_override=host.rstrip("/"), scheme=scheme, allow_bucket_creation=False), path
    return pafs.S3FileSystem(), path


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    fs, path = open_store(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def read_bytes(uri: str) -> bytes:
    fs, path = open_store(uri)
    try:
        with fs.open_input_stream(path) as stream:
            return stream.read()
    except FileNotFoundError as error:
        raise PipelineError(f"{uri} does not exist") from error


def write_bytes(uri: str, content: bytes | pa.Buffer) -> None:
    """Write one file whole or not at all."""
    fs, path = open_store(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        partial = f"{path}.partial-{os.getpid()}"
        with open(partial, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    else:  # an object appears when its upload ends, never before
        with fs.open_output_stream(path) as stream:
            stream.write(content)


def list_names(uri: str) -> list[str]:
    """Names of the files and folders directly under ``uri``, sorted; empty when there is no such folder."""
    fs, path = open_store(uri)
    selector = pafs.FileSelector(path, allow_not_found=True)
    return sorted(info.base_name for info in fs.get_file_info(selector))
