"""What a day takes place in: a Ray head with a second node, an object store, an MLflow server, and all jobs that were
submitted to it."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.cluster.conftest import MARK, ROOT, RayHead, free_ports, marked, running_head
from tests.cluster.nodes import BUCKET, ObjectStore, object_store, wait_for

RUNS, DATASETS = f"s3://{BUCKET}/runs", f"s3://{BUCKET}/datasets"
OVER = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
LONGEST = 600.0  # seconds that one job may take
JOB = "DAY_JOB"  # in the environment of a job's processes: which it is
PRINTED = re.compile(r"python -m jobs\.\w+ [^\n;]*")  # a command to be followed
SLOW = '''
import time

from torch import nn


class Slow(nn.Module):
    """A small network that takes its time in training, so that there is something to disturb."""

    def __init__(self, shape, pause: float = 0.25):
        super().__init__()
        self.out_features, self.pause = 16, pause
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], self.out_features))

    def forward(self, images):
        time.sleep(self.pause if self.training else 0.0)
        return self.layers(images)
'''

SEARCH = """# @package _global_
space: {optimizer.lr: {low: 0.001, high: 0.01, log: true}}
trials: 3
scheduler: {kind: none}
finalists: {count: 1, seeds: 1}
"""


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    number: int
    who: str
    command: str
    code: int | None  # None: its driver was killed, or it was stopped before it could say anything
    log: str
    asked: bool  # to stop
    hurt: bool  # its driver was killed by us

    @property
    def said(self) -> str:
        """The last line that is the job's own."""
        lines = [line for line in self.log.splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("error: ") or "go on with it" in line or "later with" in line]
        return (told or lines or [""])[-1]

    @property
    def next(self) -> list[str] | None:
        """The command that it printed to be gone on with: the job and its arguments."""
        found = PRINTED.findall(self.said)
        return shlex.split(found[-1])[2:] if found else None


class Server:
    """MLflow's, on SQLite; it can be killed and comes back at the same address with what it knew."""

    def __init__(self, folder: Path) -> None:
        [port] = free_ports(1)
        self.uri, self._log = f"http://127.0.0.1:{port}", folder / "mlflow.log"
        self._command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "served"),
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # as infra/mlflow has it
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command, env=env, stdout=output, stderr=output, start_new_session=True
            )
        wait_for(self._answers, 180, "the MLflow server")

    def stop(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # the group is this server's own session
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        with suppress(requests.RequestException):
            return requests.get(f"{self.uri}/health", timeout=5).ok
        return False


@dataclass
class World:
    folder: Path
    head: RayHead
    objects: ObjectStore
    server: Server
    at_once: threading.Semaphore
    secret: str = field(default_factory=lambda: secrets.token_hex(16))
    over: threading.Event = field(default_factory=threading.Event)  # nobody begins anything new
    began: float = field(default_factory=time.monotonic)
    ended: list[Ended] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # what must not be
    hurt: set[str] = field(default_factory=set)  # jobs whose drivers were killed
    node: subprocess.Popen[bytes] | None = None
    _count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def tracking(self) -> list[str]:
        return ["tracking=server", f"tracking.uri={self.server.uri}"]

    def say(self, what: str) -> None:
        print(f"{time.monotonic() - self.began:>5.0f} s  {what}", flush=True)

    def submit(self, who: str, *command: str, stop_after: float | None = None, waits: bool = True) -> Ended:
        """``python -m COMMAND`` as a job of the head, to its end; ``stop_after`` so many seconds it is asked to end.

        It waits while as many as the day allows are there, unless ``waits`` is false.
        """
        with self._lock:
            self._count += 1
            number = self._count
        with self.at_once if waits else nullcontext():
            ended = self._run(number, who, command, stop_after)
        with self._lock:
            self.ended.append(ended)
        how = "driver killed" if ended.hurt else f"{'asked to end, ' if ended.asked else ''}status {ended.code}"
        self.say(f"{who}: job {number}, {command[0]}: {how}" + (f": {ended.said[:160]}" if ended.code else ""))
        return ended

    def _run(self, number: int, who: str, command: tuple[str, ...], stop_after: float | None) -> Ended:
        client = JobSubmissionClient(self.head.address)
        variables = {"AWS_SECRET_ACCESS_KEY": self.secret, "PYTHONPATH": ".", JOB: str(number)}
        line = shlex.join(["python", "-m", *command])
        surroundings = {"working_dir": str(self.folder / "code"), "env_vars": variables}
        name = client.submit_job(entrypoint=line, runtime_env=surroundings)
        began, asked = time.monotonic(), False
        while (status := client.get_job_status(name)) not in OVER:
            waited = time.monotonic() - began
            if stop_after is not None and waited > stop_after and not asked:
                asked = client.stop_job(name)
            if waited > LONGEST:
                self.wrong.append(f"job {number} ({line}) stood still for {LONGEST:g} s: {self._tail(client, name)}")
                client.stop_job(name)
                wait_for(lambda: client.get_job_status(name) in OVER, 120, f"the end of job {number}")
                break
            time.sleep(0.5)
        log = client.get_job_logs(name)
        code = client.get_job_info(name).driver_exit_code
        if status is JobStatus.STOPPED and "go on with it" in log:
            code = 143
        hurt = str(number) in self.hurt
        (self.folder / "logs" / f"{number}.log").write_text(f"$ {line}\n{log}")
        return Ended(number, who, line, None if hurt or code in (-9, -15) else code, log, asked, hurt)

    @staticmethod
    def _tail(client: JobSubmissionClient, name: str) -> str:
        return " | ".join(client.get_job_logs(name).splitlines()[-3:])

    def start_node(self) -> None:
        """A second node, as a machine of its own would join: with a folder of its own, or it would sweep the head's."""
        ports = dict(zip(("node-manager-port", "dashboard-agent-listen-port", "metrics-export-port"), free_ports(3),
                         strict=True))  # fmt: skip
        options = [f"--{key}={value}" for key, value in ports.items()]
        command = ["ray", "start", f"--address={self.head.gcs}", "--block", "--num-cpus=3",
                   f"--temp-dir={self.folder / 'node'}", f"--object-store-memory={120 * 2**20}", *options]  # fmt: skip
        with (self.folder / "node.log").open("ab") as output:
            self.node = subprocess.Popen(command, env=self.head.env, stdout=output, stderr=output)

    def kill_node(self) -> None:
        """The machine is gone: all its processes get SIGKILL at once."""
        if self.node is None:
            return
        with suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(self.node.pid).children(recursive=True), psutil.Process(self.node.pid)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.node.wait()
        self.node = None

    def processes(self, part: str) -> list[psutil.Process]:
        """Those of this head whose command line has ``part``."""
        found = []
        for pid in marked(self.head.env[MARK]):
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if part in " ".join(process.cmdline()):
                    found.append(process)
        return found


@contextmanager
def world(folder: Path, at_once: int) -> Iterator[World]:
    for name in ("cache", "images", "logs", "temporary", "code"):
        (folder / name).mkdir()
    for part in ("pipeline", "jobs"):
        shutil.copytree(ROOT / part, folder / "code" / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "code" / "slow.py").write_text(SLOW)
    (folder / "code" / "campaign").mkdir()
    (folder / "code" / "campaign" / "search.yaml").write_text(SEARCH)
    with ExitStack() as stack:
        objects = stack.enter_context(object_store())
        variables = {
            **objects.environment,
            "PIPELINE_CACHE": str(folder / "cache"),
            "TMPDIR": str(folder / "temporary"),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_JOB_STOP_WAIT_TIME_S": "90",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_memory_monitor_refresh_ms": "0",  # it kills jobs of this head for what others use on the machine
        }
        variables.pop("AWS_SECRET_ACCESS_KEY")  # every job brings it
        head = stack.enter_context(running_head(**variables))
        server = Server(folder)
        stack.callback(server.stop)
        server.start()
        here = World(folder, head, objects, server, threading.Semaphore(at_once))
        stack.callback(here.kill_node)
        here.start_node()
        yield here
