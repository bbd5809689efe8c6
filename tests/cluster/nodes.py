"""Several Ray nodes on this machine, each with folders of its own, and the store that is all they share."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from pipeline.training.cluster import WITHOUT_DASHBOARD
from tests.cluster.conftest import ROOT, free_ports

BUCKET = "pipeline"
KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
NODE_CPUS, WORKER_CPUS = 2, 1.5  # one training worker a node; what is left plans episodes


@dataclass
class ObjectStore:
    """The faulty store as a process: where it answers, and what goes wrong in it."""

    host: str
    port: int

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {**KEYS, "AWS_ENDPOINT_URL": self.endpoint}

    def fail(self, *rules: dict[str, Any]) -> None:
        """From now on only these rules hold; none: the store is well again."""
        body = json.dumps(rules).encode()
        request = urllib.request.Request(f"{self.endpoint}/_faults", data=body, method="PUT")
        urllib.request.urlopen(request, timeout=30).close()

    def met(self) -> list[int]:
        """How many requests each rule has met."""
        with urllib.request.urlopen(f"{self.endpoint}/_faults", timeout=30) as answer:
            return json.load(answer)


@contextmanager
def object_store(host: str = "127.0.0.1") -> Iterator[ObjectStore]:
    import boto3

    (port,) = free_ports(1)
    store = ObjectStore(host, port)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.faulty_store", host, str(port)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: _answers(store), 60, "the object store")
        client = boto3.client(
            "s3", endpoint_url=store.endpoint, region_name="us-east-1",
            aws_access_key_id="testing", aws_secret_access_key="testing",
        )  # fmt: skip
        client.create_bucket(Bucket=BUCKET)
        yield store
    finally:
        process.kill()
        process.wait()


@dataclass
class Nodes:
    """A head without training load and nodes that train, each with its own cache and temporary folder."""

    folder: Path
    environment: dict[str, str]  # of every node
    cluster: Cluster = field(init=False)
    nodes: list[Any] = field(default_factory=list)
    started: int = 0

    def start(self, count: int) -> None:
        local = self._local("head")
        head = {"num_cpus": 1, "include_dashboard": False, "env_vars": local, **_options()}
        self.cluster = self._tried(
            local, lambda: Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        )
        for _ in range(count):
            self.add()
        ray.init(address=self.cluster.address, log_to_driver=True)

    def _tried(self, local: dict[str, str], begin: Callable[[], Any]) -> Any:
        """What ``begin`` returns, at the second try if need be."""
        try:
            with _patience_for_raylets():
                return begin()
        except Exception:
            end_all(local["TMPDIR"])
            with _patience_for_raylets():
                return begin()

    def add(self, **environment: str) -> Any:
        self.started += 1
        local = self._local(f"node{self.started}")
        node = self._tried(
            local,
            lambda: self.cluster.add_node(num_cpus=NODE_CPUS, env_vars=local | environment, **_options()),
        )
        self.nodes.append(node)
        return node

    def kill(self, node: Any) -> None:
        """The machine is gone: every process of the node gets SIGKILL at once."""
        end_all(node._ray_params.env_vars["TMPDIR"])
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def drain(self, node: Any, seconds: float) -> None:
        """Tell Ray that the node will be reclaimed, as ``ray drain-node`` does."""
        reason = 2  # DRAIN_NODE_REASON_PREEMPTION
        deadline = int((time.time() + seconds) * 1000)
        client = ray._raylet.GcsClient(address=self.cluster.address)
        accepted, why = client.drain_node(node.node_id, reason, "reclaimed by a test", deadline)
        assert accepted, why

    @contextmanager
    def frozen(self, node: Any) -> Iterator[None]:
        """Every process of the node stands still."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        processes = [raylet, *raylet.children(recursive=True)]
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def alive(self, node: Any) -> bool:
        return any(entry["Alive"] for entry in ray.nodes() if entry["NodeID"] == node.node_id)

    def replace(self, wanted: int) -> None:
        """As many nodes as a test begins with."""
        for extra in self.nodes[wanted:]:
            self.kill(extra)
        while len(self.nodes) < wanted:
            self.add()

    def local(self, node: Any) -> Path:
        """The folder that stands for the node's disk."""
        return Path(node._ray_params.env_vars["TMPDIR"]).parent

    def stop(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()
        end_all(str(self.folder))
        shutil.rmtree(self.folder, ignore_errors=True)

    def _local(self, name: str) -> dict[str, str]:
        places = {"TMPDIR": self.folder / name / "tmp", "PIPELINE_CACHE": self.folder / name / "cache"}
        for place in places.values():
            place.mkdir(parents=True)
        return {**self.environment, **{key: str(place) for key, place in places.items()}}


@contextmanager
def _patience_for_raylets(seconds: float = 240) -> Iterator[None]:
    """Ray gives a raylet half a minute to appear; on a busy machine its agents alone take longer to be imported."""
    ask = ray._private.services.get_node

    def ask_again(*arguments: Any, **options: Any) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            try:
                return ask(*arguments, **options)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    ray._private.services.get_node = ask_again
    try:
        yield
    finally:
        ray._private.services.get_node = ask


def end_all(temporary: str) -> None:
    """SIGKILL to every process whose temporary folder is this one or within it."""
    wanted = f"TMPDIR={temporary}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(part.startswith(wanted) for part in (entry / "environ").read_bytes().split(b"\0")):
                os.kill(int(entry.name), signal.SIGKILL)


def workers_of(node: Any) -> list[psutil.Process]:
    """The training workers on a node."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [child for child in raylet.children(recursive=True) if "RayTrainWorker" in " ".join(child.cmdline())]


def wait_for(condition: Any, seconds: float, what: str) -> Any:
    """The first true value of ``condition()``; an error that names ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise TimeoutError(f"{what}: not within {seconds:g} s")


def _options() -> dict[str, int]:
    """A small store, and ports that are known: a raylet that must learn them from its agents gives up after 15 s."""
    names = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", "dashboard_agent_listen_port")
    return {"object_store_memory": 120 * 2**20, **dict(zip(names, free_ports(4), strict=True))}


def _answers(store: ObjectStore) -> bool:
    try:
        store.met()
        return True
    except OSError:
        return False


def environment_for(store: ObjectStore) -> dict[str, str]:
    """What this process and every node need to know."""
    return {
        **store.environment,
        "PYTHONPATH": str(ROOT),
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "RAY_agent_register_timeout_ms": "300000",
        **WITHOUT_DASHBOARD,
        "RAY_prestart_worker_first_driver": "0",  # fewer processes: the machine may be busy
    }
