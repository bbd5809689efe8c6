"""Hosts on this machine: network namespaces with addresses of their own, joined by a bridge, each with its own disk.

A host's disk is a tmpfs that only its processes see, at the same path on every host; what is installed is shared and
only read. Needs root, ``ip`` and ``unshare``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.conftest import ROOT
from tests.cluster.nodes import wait_for

GCS_PORT = 6399


class Impossible(Exception):
    """This machine gives no namespaces: why."""


@dataclass
class Host:
    name: str
    address: str
    link: str  # the end of its cable at the bridge
    process: subprocess.Popen[bytes]
    disk: Path
    environment: dict[str, str]

    def popen(self, *command: str, **options: object) -> subprocess.Popen[str]:
        """A command on this host."""
        inside = ["nsenter", "-t", str(self.process.pid), "-n", "-m", "--wdns=" + str(ROOT)]
        return subprocess.Popen([*inside, *command], env=self.environment, text=True, **options)  # type: ignore

    def run(self, *command: str, seconds: float = 120) -> str:
        process = self.popen(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = process.communicate(timeout=seconds)
        if process.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(command)}: {output}")
        return output

    def cut_off(self) -> None:
        ip("link", "set", self.link, "down")

    def connect(self) -> None:
        ip("link", "set", self.link, "up")

    def kill(self) -> None:
        """Every process of the host, by its network namespace."""
        with suppress(OSError):
            own = os.stat(f"/proc/{self.process.pid}/ns/net").st_ino
            for entry in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    if os.stat(entry / "ns/net").st_ino == own and int(entry.name) != self.process.pid:
                        os.kill(int(entry.name), signal.SIGKILL)


@dataclass
class Network:
    bridge: str
    prefix: str  # of the addresses: three bytes
    disk: Path
    environment: dict[str, str]
    hosts: list[Host] = field(default_factory=list)

    @property
    def gateway(self) -> str:
        return f"{self.prefix}.1"

    def add(self) -> Host:
        number = len(self.hosts) + 2
        name, link = f"{self.bridge}-{number}", f"{self.bridge}v{number}"
        mounts = f"mount --make-rprivate / && mount -t tmpfs -o size=2g tmpfs {self.disk} && mkdir -p /dev/shm"
        shared = "mount -t tmpfs -o size=1g tmpfs /dev/shm && mount -t sysfs sysfs /sys"
        places = f"mkdir -p {self.disk}/tmp {self.disk}/cache {self.disk}/ray"
        stay = f"ip link set lo up && {mounts} && {shared} && {places} && exec sleep infinity"
        process = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", stay], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        address = f"{self.prefix}.{number}"
        environment = {
            **self.environment, "TMPDIR": f"{self.disk}/tmp", "PIPELINE_CACHE": f"{self.disk}/cache",
            "GLOO_SOCKET_IFNAME": "eth0", "RAY_TMPDIR": f"{self.disk}/ray",
        }  # fmt: skip
        host = Host(name, address, link, process, self.disk, environment)
        self.hosts.append(host)
        wait_for(lambda: _is_apart(process.pid), 20, f"the namespace of {name}")
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        ip("link", "set", link, "master", self.bridge, "up")
        wait_for(lambda: host.run("sh", "-c", f"ls -d {self.disk}/ray 2>/dev/null || true").strip(), 20, "its disk")
        host.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        host.run("ip", "route", "add", "default", "via", self.gateway)
        return host

    def start_ray(self, host: Host, *options: str) -> subprocess.Popen[str]:
        """``ray start`` on a host, for as long as it lives."""
        where = [f"--node-ip-address={host.address}", f"--object-store-memory={120 * 2**20}", "--disable-usage-stats"]
        agents = ("metrics-export", "dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent")
        where += [f"--{name}-port={port}" for name, port in zip(agents, range(7001, 7005), strict=True)]
        log = open(self.disk.parent / f"{host.name}.log", "w")  # noqa: SIM115
        return host.popen("ray", "start", "--block", *where, *options, stdout=log, stderr=subprocess.STDOUT)


@contextmanager
def network(environment: dict[str, str]) -> Iterator[Network]:
    """A bridge whose hosts are added, and taken down to the last process.

    Raises:
        Impossible: no root, no ``ip``, or no namespaces.
    """
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            raise Impossible(f"there is no {tool}")
    if os.geteuid():
        raise Impossible("only root makes namespaces")
    bridge = f"rh{os.getpid() % 10000}"
    prefix = f"10.{os.getpid() % 200 + 20}.77"
    folder = Path(tempfile.mkdtemp(prefix="h", dir="/var/tmp"))
    (folder / "disk").mkdir()
    try:
        ip("link", "add", bridge, "type", "bridge")
    except RuntimeError as error:
        raise Impossible(str(error)) from error
    net = Network(bridge, prefix, folder / "disk", environment)
    try:
        ip("address", "add", f"{net.gateway}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        yield net
    finally:
        for host in net.hosts:
            host.kill()
            host.process.kill()
            host.process.wait()
        time.sleep(0.2)
        ip("link", "del", bridge)
        shutil.rmtree(folder, ignore_errors=True)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _is_apart(pid: int) -> bool:
    return os.stat(f"/proc/{pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino
