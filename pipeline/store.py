"""Folders on a local disk or in an object store, behind one small interface."""

import errno
import logging
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import PipelineError, Unavailable
from pipeline.files import create_atomic, write_atomic

PATIENCE_S = 120.0  # how long a store that answers with errors, or not at all, is asked again
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0  # seconds between two askings
_ATTEMPTS = 15  # of one request by the S3 client, whose pauses double up to 20 s: two minutes, on average
_PERMANENT = re.compile(
    "ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS|INVALID_CLIENT|INVALID_SIGNATURE|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED|"
    "TOKEN_EXPIRED|EXPIRED_TOKEN|MISSING_AUTH|OPT_IN|HTTP status 4(?!08|29)"
)
_PASSING = (errno.EIO, errno.ESTALE, errno.EDQUOT, errno.ETIMEDOUT)  # of a disk: another time it may be written
_MISTAKEN = (errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)  # of a place: it stays so
_logger = logging.getLogger(__name__)
T = TypeVar("T")


class PatientS3(pafs.S3FileSystem):
    """An S3 file system that asks a failing store again for two minutes, wherever it is sent.

    (pyarrow's own forgets its retry strategy when it is pickled, and so asks three times on every worker.)
    """

    def __init__(self, **options: Any) -> None:
        retries = pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS)
        super().__init__(retry_strategy=retries, connect_timeout=10, request_timeout=30, **options)
        self._options = options

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(PatientS3, **self._options), ()


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def open_store(uri: str, patient: bool = False) -> tuple[pafs.FileSystem, str]:
    """The file system of a folder and the folder's path on it.

    ``uri`` is a local path or ``s3://bucket/prefix``. Endpoint and credentials of S3 come from the standard
    environment variables (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ...) or the machine's role.

    Args:
        patient: the file system itself asks again for two minutes, for callers that do not.
    """
    if not is_remote(uri):
        return pafs.LocalFileSystem(), os.path.abspath(uri.removeprefix("file://"))
    scheme, _, path = uri.partition("://")  # no URL: "#", "?" and "%" are letters of a key as others are
    if scheme.lower() != "s3" or not path.partition("/")[0]:
        raise PipelineError(f"{uri!r} is no folder this pipeline reads: give a local path or s3://bucket/prefix")
    path = path.rstrip("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {}
    if endpoint:
        scheme, _, host = endpoint.partition("://")
        options = {"endpoint_override": host.rstrip("/"), "scheme": scheme, "allow_bucket_creation": False}
    return PatientS3(**options) if patient else pafs.S3FileSystem(**options), path


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def places(name: str, folder: str) -> list[str]:
    """Where what is given as ``name`` may be: there itself, and in ``folder``, unless it is an address."""
    return [name] if is_remote(name) else [name, join(folder, name)]


def exists(uri: str) -> bool:
    fs, path = open_store(uri)
    with _reading(uri, path):
        return asking(uri, lambda: fs.get_file_info(path).type != pafs.FileType.NotFound)


def read_bytes(uri: str) -> bytes:
    fs, path = open_store(uri)

    def read() -> bytes:
        with fs.open_input_stream(path) as stream:
            content: bytes = stream.read()
            return content

    try:
        with _reading(uri, path):
            return asking(uri, read)
    except FileNotFoundError as error:
        raise PipelineError(f"{uri} does not exist") from error


def write_bytes(uri: str, content: bytes | pa.Buffer) -> None:
    """Write one file whole or not at all."""
    fs, path = open_store(uri)

    def write() -> None:
        if isinstance(fs, pafs.LocalFileSystem):
            with writing(uri, "folder"):
                write_atomic(path, content)
        else:  # an object appears when its upload ends, never before
            with fs.open_output_stream(path) as stream:
                stream.write(content)

    asking(uri, write)


def create_bytes(uri: str, content: bytes) -> bool:
    """Write one file whole, unless there is one; whether it was written. Of many who ask at once, one is told so."""
    path = open_store(uri)[1]
    if is_remote(uri):
        claim = uuid.uuid4().hex
        return asking(uri, lambda: _put_new(path, content, claim))
    with writing(uri, "folder"):
        return create_atomic(path, content)


def _put_new(path: str, content: bytes, claim: str) -> bool:
    """A conditional put, which pyarrow does not have. ``claim`` tells an earlier attempt, whose answer was lost, from
    somebody else's object."""
    import boto3  # here, since few of those who read a store create a file
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = path.partition("/")
    try:
        client = boto3.client("s3")
        try:
            client.put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*", Metadata={"claim": claim})
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status == 412:
                return bool(client.head_object(Bucket=bucket, Key=key)["Metadata"].get("claim") == claim)
            if status != 501:
                raise
            client.put_object(Bucket=bucket, Key=key, Body=content)  # a store without conditions, where all may win
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        told = "" if status == 409 else f" (HTTP status {status})"  # 409: another put is under way; asked again
        raise OSError(f"{error}{told}") from error
    except BotoCoreError as error:
        raise OSError(str(error)) from error
    return True


def list_names(uri: str) -> list[str]:
    """Names of the files and folders directly under ``uri``, sorted; empty when there is no such folder."""
    fs, path = open_store(uri)
    selector = pafs.FileSelector(path, allow_not_found=True)
    with _reading(uri, path):
        return asking(uri, lambda: sorted(info.base_name for info in fs.get_file_info(selector)))


def remove(uri: str) -> None:
    """Delete a folder with all that is in it."""
    fs, path = open_store(uri)
    asking(uri, lambda: fs.delete_dir(path))


def remove_files(uri: str, names: Iterable[str]) -> None:
    """Delete files of a folder."""
    fs, path = open_store(uri)
    for name in names:
        asking(uri, partial(fs.delete_file, join(path, name)))


def rename(uri: str, name: str) -> None:
    """Give a file another name in its folder."""
    fs, path = open_store(uri)
    asking(uri, lambda: fs.move(path, join(path.rpartition("/")[0], name)))


def asking(uri: str, action: Callable[[], T], patience: float | None = None) -> T:
    """What ``action`` returns; where an object store answers with errors or not at all, it is asked again.

    Raises:
        FileNotFoundError: as the action does.
        PipelineError: the store refuses.
        Unavailable: the store still fails after ``patience`` seconds, or a disk is full.
    """
    began, wait = time.monotonic(), _FIRST_WAIT
    patience = PATIENCE_S if patience is None else patience
    while True:
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise Unavailable(disk_full(uri)) from error
            if not is_remote(uri):
                raise
            reason = " ".join(str(error).split())
            if _PERMANENT.search(reason):
                raise PipelineError(f"{uri}: the object store refuses: {reason}") from error
            if time.monotonic() - began > patience:
                raise Unavailable(f"{uri}: the object store fails for {patience:g} s now: {reason}") from error
            if wait == _FIRST_WAIT:
                _logger.warning("%s: %s; asking again for up to %g s", uri, reason, patience)
            time.sleep(wait * random.SystemRandom().uniform(0.5, 1))  # the shared generator is the training step's
            wait = min(2 * wait, _LONGEST_WAIT)


@contextmanager
def _reading(uri: str, path: str) -> Iterator[None]:
    """A local place of the wrong kind, or that may not be read, ends in one line; what may pass is left as it is."""
    try:
        yield
    except OSError as error:
        number = errno.EISDIR if error.errno is None and os.path.isdir(path) else error.errno  # pyarrow gives it none
        if is_remote(uri) or number not in _MISTAKEN:
            raise
        raise PipelineError(f"{uri} cannot be read ({os.strerror(number)})") from error


@contextmanager
def writing(where: str, key: str) -> Iterator[None]:
    """A local place that cannot be written ends in one line, which names the ``key`` that chose it."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise Unavailable(disk_full(where)) from error
        reason = error.strerror or " ".join(str(error).split())
        kind = Unavailable if error.errno in _PASSING else PipelineError
        raise kind(f"{where} cannot be written ({reason}); give another {key}") from error


def check_output(uri: str, key: str) -> None:
    """Refuse, before any work, a file that could not be written after it; ``key`` named it."""
    refuse_missing_bucket(uri)
    if is_remote(uri):
        return
    path = Path(open_store(uri)[1])
    if path.is_dir():
        raise PipelineError(f"{key}={uri} is a folder; give the name of a file in it")
    _check_folder(path.parent, f"{key}={uri}", "file")


def check_folder(uri: str, key: str) -> None:
    """Make a folder, or refuse before any work one in which nothing could be written after it; ``key`` named it."""
    refuse_missing_bucket(uri)
    if not is_remote(uri):
        _check_folder(Path(open_store(uri)[1]), f"{key}={uri}", "folder")


def _check_folder(path: Path, where: str, key: str) -> None:
    with writing(where, key):
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")


def refuse_missing_bucket(uri: str) -> None:
    """Refuse a folder of an object store whose bucket does not exist; who may not ask is believed."""
    if not is_remote(uri):
        return
    fs, path = open_store(uri)
    bucket = path.partition("/")[0]
    try:
        missing = asking(uri, lambda: fs.get_file_info(bucket).type == pafs.FileType.NotFound)
    except PipelineError:
        return
    if missing:
        raise PipelineError(f"{uri}: there is no bucket {bucket!r} at this object store; make it, or mend the name")


def disk_full(path: str) -> str:
    """The one line about a full disk."""
    return (
        f"the disk of {path} is full: free space there or move the folder: PIPELINE_CACHE for shards, TMPDIR for "
        "checkpoints on their way, storage=FOLDER for runs"
    )
