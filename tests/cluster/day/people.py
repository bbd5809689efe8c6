"""Those who use the cluster during a day, each in a thread of their own, until it is over."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline import store
from pipeline.errors import PipelineError
from pipeline.registry.aliases import CHAMPION
from pipeline.training.runs import checkpoints
from tests.cluster.conftest import free_ports
from tests.cluster.day.world import DATASETS, RUNS, Ended, World
from tests.cluster.nodes import wait_for
from tests.retraining.conftest import IMAGES, add_classes, class_name

TRAIN = [
    "method=prototypical", "~backbone", "+backbone={name:slow.Slow}", "data=glyphs", f"data.root={DATASETS}",
    f"storage={RUNS}", "steps=80", "train.way=5", "train.query=3", "train.meta_batch_size=2", "validation.every=40",
    "validation.episodes=8", "validation.query=5", "checkpoint.every=10", "checkpoint.keep=2", "evaluation=null",
    "register_as=null", "cluster.workers=1", "cluster.cpus_per_worker=0.5", "cluster.restarts=9", "log_every=20",
]  # fmt: skip
SMALL = [
    "data=glyphs", f"data.root={DATASETS}", f"storage={RUNS}", "backbone.width=8", "steps=10", "train.way=5",
    "train.query=3", "train.meta_batch_size=1", "validation.every=10", "validation.episodes=8", "validation.query=5",
    "cluster.workers=1", "cluster.cpus_per_worker=0.5",
]  # fmt: skip
SEEDS = (3, 4)
RACED = "raced"  # a registered model with two versions, of which each would be champion
BAD = (  # what people mistype, and what the one line must name
    (["jobs.train", *TRAIN, "train.wey=5"], "train.wey"),
    (["jobs.train", *TRAIN, "steps=-1"], "steps"),
    (["jobs.train", *TRAIN, "data.name=nowhere"], "no dataset"),
    (["jobs.train", *TRAIN, "train.way=500"], "train.way"),
    (["jobs.train", f"resume={RUNS}/nobody"], "no run"),
    (["jobs.evaluate", "run=nobody", f"storage={RUNS}", "tracking=none"], "no run"),
)
FIRST = 24  # classes of the folder that grows
TRIES = 15  # of one piece of work
PAUSE = 5.0  # seconds before a job that may work later is tried again


def weights_of(run: str) -> str:
    """What its last checkpoint holds: SHA-256 of the weights."""
    state = json.loads(store.read_bytes(f"{checkpoints(run)[-1]}/state.json"))
    return str(state["sha256"]["model.safetensors"])


def last_step(run: str) -> int:
    return int(json.loads(store.read_bytes(f"{checkpoints(run)[-1]}/state.json"))["step"])


def finish(world: World, who: str, command: list[str], again: Callable[[], list[str]], *, good: tuple[int, ...] = (0,),
           stop_after: float | None = None) -> Ended | None:  # fmt: skip
    """A command until it ends well; after anything else the one it printed, or ``again`` where it could print none.

    What is neither is noted as wrong.
    """
    for _ in range(TRIES):
        ended = world.submit(who, *command, stop_after=stop_after)
        stop_after = None
        if ended.code in good:
            return ended
        if not (ended.hurt or ended.asked or ended.code in (75, 143)):
            world.wrong.append(f"job {ended.number} of {who} ended with {ended.code}: {ended.said[:300]}")
            return None
        if ended.code == 75 and not ended.said:
            world.wrong.append(f"job {ended.number} of {who} ended with 75 and did not say why")
        if ended.code == 143 and ended.next is None:
            world.wrong.append(f"job {ended.number} of {who} was stopped and did not say how to go on: {ended.said}")
        command = ended.next or again()
        if ended.code == 75:
            time.sleep(PAUSE)
    world.wrong.append(f"{who}: {' '.join(command)[:200]} did not end well in {TRIES} tries")
    return None


@dataclass
class Person:
    """Trains one small run after the other, stops some, goes on with them, measures them, and mistypes one in ten."""

    world: World
    number: int
    seed: int
    references: dict[int, str]  # seed of a run -> weights of the undisturbed one
    runs: list[str] = field(default_factory=list)

    def __call__(self) -> None:
        draw, count = random.Random(f"{self.seed}/{self.number}"), 0
        while not self.world.over.is_set():
            count += 1
            if draw.random() < 0.1 or (count == 2 and self.number % 3 == 0):
                self.mistype(*draw.choice(BAD))
                continue
            stop_after = draw.uniform(15, 40) if draw.random() < 0.4 else None
            self.train(f"p{self.number}-{count}", draw.choice(SEEDS), stop_after)

    def train(self, name: str, seed: int, stop_after: float | None) -> None:
        who, uri = f"person {self.number}", f"{RUNS}/{name}"
        begin = ["jobs.train", *TRAIN, *self.world.tracking, f"name={name}", f"seed={seed}"]

        def again() -> list[str]:
            begun = store.exists(f"{uri}/run.json")
            return ["jobs.train", f"resume={uri}"] if begun else begin

        if finish(self.world, who, begin, again, stop_after=stop_after) is None:
            return
        if last_step(uri) != 80 or weights_of(uri) != self.references[seed]:
            self.world.wrong.append(f"run {name} has other weights than an undisturbed one (step {last_step(uri)})")
        else:
            self.runs.append(name)
        measure = ["jobs.evaluate", f"run={uri}", "episodes=20", "shot=1", "query=5", "tracking=none"]
        finish(self.world, who, measure, lambda: measure)

    def mistype(self, command: list[str], names: str) -> None:
        more = [] if "resume" in command[-1] or "jobs.evaluate" in command else self.world.tracking
        ended = self.world.submit(f"person {self.number}", *command, *more)
        errors = [line for line in ended.log.splitlines() if line.startswith("error: ")]
        if not ended.hurt and ended.code != 75 and (ended.code != 2 or len(errors) != 1 or names not in errors[0]):
            self.world.wrong.append(f"job {ended.number}: a mistake ended with {ended.code}: {errors or ended.said}")


@dataclass
class Nights:
    """A retraining every ``period`` seconds, on a folder that grows; one new image in ten cannot be read."""

    world: World
    period: float
    classes: int = 0
    done: int = 0

    @property
    def command(self) -> list[str]:
        return [
            "jobs.retrain", "data=folder", "data.name=growing", f"data.root={DATASETS}",
            f"data.source.path={self.world.images}", "data.source.shape=[1,28,28]",
            "data.source.fractions={train: 0.4, val: 0.3, test: 0.3}", f"storage={RUNS}", *self.world.tracking,
            "register_as=people", "backbone.width=8", "steps=8", "train.query=3", "train.meta_batch_size=1",
            "validation.every=4", "validation.episodes=10", "validation.query=3", "checkpoint.every=4",
            "evaluation=null", "retrain.promotion.episodes=40", "retrain.promotion.query=3", "retrain.shard_mb=1",
            "retrain.max_skipped_fraction=0.3", "retrain.lease=20", "cluster.workers=1", "cluster.cpus_per_worker=0.5",
        ]  # fmt: skip

    def __call__(self) -> None:
        while not self.world.over.is_set():
            if finish(self.world, "night", self.command, lambda: self.command, good=(0, 3, 4, 5)):
                self.done += 1
            self.world.over.wait(self.period)
            self.grow()

    def grow(self) -> None:
        known, self.classes = self.classes, self.classes + 2 if self.classes else FIRST
        add_classes(self.world.images, range(known, self.classes))
        folder = self.world.images / class_name(self.classes - 1)
        for number in range(IMAGES // 10 + 1):
            (folder / f"broken{number}.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")


@dataclass
class Searcher:
    """A small campaign."""

    world: World
    found: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> None:
        own = ("storage", "validation.episodes", "validation.query")
        base = [f"base.{argument}" for argument in SMALL if not argument.startswith(own)]
        command = [
            "jobs.tune", "campaign=campaign/search.yaml", "name=campaign", f"storage={RUNS}", *self.world.tracking,
            *base, "objective.episodes=8", "objective.query=5", "concurrent=1", "register_as=searched",
        ]  # fmt: skip

        def again() -> list[str]:
            begun = store.exists(f"{RUNS}/campaign/campaign.json")
            return ["jobs.tune", "resume=campaign", f"storage={RUNS}"] if begun else command

        ended = finish(self.world, "campaign", command, again)
        if ended:
            self.found = {"ended": ended.number}


@dataclass
class Race:
    """Two versions of a model without a champion are promoted at once, again and again: one of them wins."""

    world: World
    runs: int = 0  # of two that were both carried out
    refused: int = 0  # of those, which ended by "became champion meanwhile"

    def __call__(self) -> None:
        while not self.world.over.is_set():
            self.round()
            self.world.over.wait(45)

    def round(self) -> None:
        """Without a champion, until there is one: MLflow may be away in between."""
        for _ in range(TRIES):
            with suppress(MlflowException, requests.RequestException):
                MlflowClient(self.world.server.uri).delete_registered_model_alias(RACED, CHAMPION)
                with ThreadPoolExecutor() as pool:
                    if self.judge(list(pool.map(self.promote, (1, 2)))):
                        return
            time.sleep(PAUSE)
        self.world.wrong.append(f"no version of {RACED} became champion in {TRIES} tries")

    def promote(self, version: int) -> Ended:
        return self.world.submit("promotion", "jobs.promote", f"name={RACED}", f"challenger={version}", "episodes=40",
                                 "query=3", *self.world.tracking, waits=False)  # fmt: skip

    def judge(self, pair: list[Ended]) -> bool:
        """Whether one of them became champion."""
        refused = [
            e for e in pair if e.code == 2 and ("became champion meanwhile" in e.said or "is under way" in e.said)
        ]
        for ended in pair:
            if not (ended.hurt or ended in refused or ended.code in (0, 3, 75)):
                self.world.wrong.append(f"job {ended.number}: a promotion ended with {ended.code}: {ended.said}")
        first = [ended for ended in pair if "becomes champion: there was no champion" in ended.log]
        if len(first) > 1:
            self.world.wrong.append(f"jobs {first[0].number} and {first[1].number}: two first champions")
        if first and all(ended in refused or ended.code in (0, 3) for ended in pair):
            self.runs += 1
            self.refused += bool(refused)
        return bool(first)


@dataclass
class Client:
    """Asks a served model the same few questions, one in ten wrong, and compares with what it was told first."""

    world: World
    uri: str
    number: int
    first: dict[str, Any]
    asked: int = 0
    refused: int = 0

    def __call__(self) -> None:
        draw = random.Random(self.number)
        while not self.world.over.wait(1.0):
            kind = draw.choice(sorted(self.first))
            bad = draw.random() < 0.1
            try:
                answer = ask(self.uri, question(self.world, kind, bad))
            except requests.RequestException as error:
                self.world.wrong.append(f"the served model at {self.uri} did not answer: {type(error).__name__}")
                continue
            self.asked += 1
            if bad:
                self.refused += 1
                if answer.status_code != 400 or "Traceback" in answer.text or len(answer.text) > 2000:
                    self.world.wrong.append(f"a wrong question was answered {answer.status_code}: {answer.text[:200]}")
            elif answer.status_code != 200 or answer.json() != self.first[kind]:
                self.world.wrong.append(f"{self.uri} answered {kind} otherwise than before: {answer.text[:200]}")


def question(world: World, kind: str, bad: bool = False) -> dict[str, Any]:
    """Five classes of the folder, from the place that ``kind`` names on, and two new images of each."""
    classes = [class_name(int(kind) + number) for number in range(5)]

    def image(name: str, number: int) -> str:
        return base64.b64encode((world.images / name / f"{number:03d}.png").read_bytes()).decode()

    labels = classes[:-1] if bad else classes
    return {
        "inputs": {
            "support_images": [image(name, 0) for name in classes],
            "support_labels": labels,
            "query_images": [image(name, number) for name in classes for number in (1, 2)],
        },
        "params": {"threshold": "none"},
    }


def ask(uri: str, content: dict[str, Any]) -> requests.Response:
    return requests.post(f"{uri}/invocations", json=content, timeout=120)


@contextmanager
def served(world: World, model: str) -> Iterator[str]:
    """``mlflow models serve`` of a registered model: its address."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model, "--env-manager", "local",
               "--port", str(port), "--host", "127.0.0.1"]  # fmt: skip
    environment = {**os.environ, "MLFLOW_TRACKING_URI": world.server.uri, "OMP_NUM_THREADS": "1",
                   "PATH": world.head.env["PATH"]}  # fmt: skip
    log = world.folder / f"served-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, cwd=world.folder, stdout=output, stderr=output,
                                   start_new_session=True)  # fmt: skip
    uri = f"http://127.0.0.1:{port}"

    def up() -> bool:
        if process.poll() is not None:
            raise PipelineError(f"{model} is not served: {log.read_text()[-1000:]}")
        with suppress(requests.RequestException):
            return requests.get(f"{uri}/ping", timeout=5).ok
        return False

    try:
        wait_for(up, 300, f"the server of {model}")
        yield uri
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the group is this server's own session
        process.wait()
