"""Downloads that go on where they stopped, are checked, and appear whole or not at all."""

import fcntl
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from pipeline import store
from pipeline.errors import PipelineError
from pipeline.files import file_digest

CHUNK = 2**18
TIMEOUT_S = 30.0  # without an answer, or without another byte of it
Report = Callable[[str], None]


def download(url: str, target: Path, md5: str, report: Report | None = None, attempts: int = 5) -> Path:
    """Fetch ``url`` to ``target`` unless a file with the checksum is there already, and return ``target``.

    What has arrived is kept in ``target.part``: an interrupted download, in this run or an earlier one, is continued
    by an HTTP range request. A file whose MD5 is not ``md5`` (the checksum its publisher gives) never gets its name.
    """
    with store.writing(str(target.parent), "data.source.cache"):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(f"{target}.lock", "w")  # noqa: SIM115 (two processes never write the same part)
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists() and file_digest(target, "md5") == md5:
            return target
        part = Path(f"{target}.part")
        _fetch(url, part, report or (lambda message: None), attempts)
        found = file_digest(part, "md5")
        if found != md5:
            part.unlink()
            raise PipelineError(f"{url} has MD5 {found}, not the published {md5}; download it again")
        os.replace(part, target)
    Path(f"{target}.lock").unlink(missing_ok=True)
    return target


def _fetch(url: str, part: Path, report: Report, attempts: int) -> None:
    failures = 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        try:
            _receive(url, part, have, report)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part is as long as the file, or longer: its checksum decides
                return
            if error.code < 500:
                raise PipelineError(f"{url}: the server answers {error.code} {error.reason}") from error
            reason: Exception = error
        except (OSError, HTTPException) as error:
            reason = error
        moved = part.exists() and part.stat().st_size > have
        failures = 0 if moved else failures + 1
        if failures >= attempts:
            raise PipelineError(
                f"{url} cannot be fetched ({reason}); what has arrived is kept: run again to go on, "
                "or fetch it by other means and give its folder as data.source.path"
            ) from reason
        report(f"{url}: {reason}; going on")
        time.sleep(min(0.2 * 2**failures, 5.0))


def _receive(url: str, part: Path, have: int, report: Report) -> None:
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
        resumed = have and answer.status == 206
        begin = have if resumed else 0
        expected = answer.headers.get("Content-Length")
        total = begin + int(expected) if expected else None
        size = "unknown size" if total is None else f"{total / 2**20:.1f} MiB"
        report(f"fetching {url} ({size}{', going on' if resumed else ''})")
        with open(part, "ab" if resumed else "wb") as stream:
            while content := answer.read(CHUNK):
                stream.write(content)
        if total is not None and part.stat().st_size < total:
            raise ConnectionError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")
