"""A Ray head of its own for a test: started by ``ray start``, and taken down to its last process."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
START_SECONDS = 90
STOP_SECONDS = 5  # a head whose actors outlive their job takes much longer, and is killed
MARK = "RAY_HEAD_OF_TEST"  # in the environment of everything that a head starts


@dataclass(frozen=True)
class RayHead:
    """A running head: where its dashboard listens, and the environment that reaches it."""

    address: str
    env: dict[str, str]

    @property
    def gcs(self) -> str:
        """Where drivers and nodes join, as the head's processes were told."""
        commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in marked(self.env[MARK])]
        return next(found[1] for text in commands if (found := re.search(r"--gcs-address=([^\0]+:[1-9]\d*)", text)))

    def submit(
        self, *command: str, env: dict[str, str] | None = None, options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """``ray job submit --working-dir . -- command``, followed to the job's end: exit code and log."""
        return subprocess.run(
            ["ray", "job", "submit", "--address", self.address, "--working-dir", ".", *options, "--", *command],
            cwd=ROOT,
            env=self.env | (env or {}),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )


@contextmanager
def running_head(**env: str) -> Iterator[RayHead]:
    """Start a head on free ports in a private folder, and stop it and all that it started."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="rayhead", dir="/tmp", ignore_cleanup_errors=True) as folder:
        dashboard, client, agent = free_ports(3)
        head_env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
            "RAY_TMPDIR": folder,  # sockets allow no long path, and /tmp/ray would name this head to other programs
            "PATH": f"{BIN}:{os.environ['PATH']}",
            MARK: mark,
        } | env  # fmt: skip
        log = Path(folder, "head.log")
        command = [
            "ray", "start", "--head", "--block", "--port=0", "--num-cpus=3",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}", f"--object-store-memory={200 * 2**20}", "--disable-usage-stats",
        ]  # fmt: skip
        with log.open("w") as output:
            head = subprocess.Popen(command, env=head_env, stdout=output, stderr=output, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{dashboard}"
            wait_until_it_answers(address, head, log)
            yield RayHead(address, head_env)
        finally:
            head.terminate()
            stop_marked(mark)
            head.wait(STOP_SECONDS)


def free_ports(count: int) -> list[int]:
    """Ports that are free now, below those that the system and Ray's workers take for themselves."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            if port not in ports and probe.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
    return ports


def wait_until_it_answers(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while head.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
            return
        except urllib.error.HTTPError:  # 401: it is there, and asks for a token
            return
        except OSError:
            time.sleep(0.25)
    raise RuntimeError(f"no Ray head at {address} after {START_SECONDS} s:\n{log.read_text()}")


def marked(mark: str) -> list[int]:
    """Processes with the mark in their environment: those that one head started, and no other's."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return found


def stop_marked(mark: str) -> None:
    """Wait for the head's processes to end, and end those that do not."""
    deadline = time.monotonic() + STOP_SECONDS
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    for _ in range(3):
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    """A head without authentication."""
    with running_head(RAY_AUTH_MODE="disabled") as started:
        yield started
