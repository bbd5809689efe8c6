"""Downloads from a server that breaks off, forgets ranges, or sends something else."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.download import download
from pipeline.errors import PipelineError

CONTENT = np.random.default_rng(0).bytes(1_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    breaks: int = 0  # so many answers end after 300,000 bytes
    ranges: bool = True
    status: int = 200
    requested: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requested.append(asked)
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        match = re.fullmatch(r"bytes=(\d+)-", asked or "") if self.server.ranges else None
        start = int(match[1]) if match else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        end = len(CONTENT)
        if self.server.breaks:
            self.server.breaks -= 1
            end = start + 300_000
        self.wfile.write(CONTENT[start:end])

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.requested = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/file.zip"


def test_a_file_arrives_once(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "cache" / "file.zip"
    assert download(url(server), target, MD5) == target
    assert target.read_bytes() == CONTENT
    assert download(url(server), target, MD5) == target
    assert len(server.requested) == 1
    assert [path.name for path in target.parent.iterdir() if path.suffix != ".lock"] == ["file.zip"]


def test_a_broken_connection_is_continued(server: Server, tmp_path: Path) -> None:
    server.breaks = 2
    download(url(server), tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT
    assert server.requested == [None, "bytes=300000-", "bytes=600000-"]


def test_a_later_run_goes_on_where_an_earlier_one_stopped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.zip.part").write_bytes(CONTENT[:700_000])
    download(url(server), tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT
    assert server.requested == ["bytes=700000-"]


def test_a_complete_part_needs_no_more_bytes(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.zip.part").write_bytes(CONTENT)
    download(url(server), tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.breaks = False, 1
    download(url(server), tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def test_another_content_never_gets_the_name(server: Server, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=f"has MD5 {MD5}, not the published 0000"):
        download(url(server), tmp_path / "file.zip", "0" * 32)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_an_altered_file_is_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.zip").write_bytes(b"altered")
    download(url(server), tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def test_refusals_and_silence_end_in_one_line(server: Server, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(PipelineError, match="the server answers 404"):
        download(url(server), tmp_path / "file.zip", MD5)
    with pytest.raises(PipelineError, match="cannot be fetched .* run again to go on"):
        download("http://127.0.0.1:9/file.zip", tmp_path / "file.zip", MD5, attempts=2)
