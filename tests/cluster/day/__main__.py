"""A day in an hour: python -m tests.cluster.day [minutes=60] [seed=0] [people=10] [at_once=3] [--json FILE]

On one live Ray head with a second node, people submit, stop, go on with and measure small runs, a retraining looks at a
folder that grows, a campaign runs, two models are served to four threads each, and promotions race. Once a minute, or
so often that all of it comes in a shorter day, something is killed or taken away, in an order drawn by the seed: a
driver, a worker, the second node, the MLflow server, the object store, the room on a disk. One input in ten is wrong.
Then what was begun is finished, and it is held that

* every run ended, or said in one line why not, with a command that goes on with it and works;
* the weights are those of undisturbed runs, bit for bit;
* no answer of a served model was another than its first one; wrong questions are refused;
* there is one champion, and no lock, temporary file or process is left;
* no traceback and no secret stands in any log.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
from mlflow import MlflowClient
from mlflow.entities import ViewType

from pipeline.tables import text_table
from tests.cluster.conftest import MARK, marked
from tests.cluster.day.people import (
    RACED,
    RUNS,
    SEEDS,
    SMALL,
    TRAIN,
    Client,
    Nights,
    Person,
    Race,
    Searcher,
    ask,
    question,
    served,
    weights_of,
)
from tests.cluster.day.troubles import KINDS, Troubles
from tests.cluster.day.world import DATASETS, World, world
from tests.cluster.nodes import BUCKET

THREADS, QUESTIONS = 4, ("0", "5", "10")
SERVED = {
    "metric": ["method=prototypical"],
    "gradient": ["method=maml", "method.inner_steps=2", "method.inner_steps_eval=2"],
}
STACK = re.compile(r'^Traceback \(most recent call last\)|^ +File ".+", line \d+, in ', re.M)  # also Ray's
LAST = 1200.0  # seconds that what was begun may take after the troubles' end


def main(arguments: list[str]) -> int:
    target = arguments[arguments.index("--json") + 1] if "--json" in arguments else None
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    minutes, seed = float(options.get("minutes", 60)), int(options.get("seed", 0))
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="day", ignore_cleanup_errors=True) as folder:
        found = spend(Path(folder), minutes, seed, int(options.get("people", 10)), int(options.get("at_once", 3)))
        if options.get("keep"):
            shutil.copytree(f"{folder}/logs", options["keep"], dirs_exist_ok=True)
    print(text_table(["what", "found"], [[key, str(value)] for key, value in found.items() if key != "wrong"]))
    for line in found["wrong"]:
        print(f"WRONG: {line}")
    if target:
        Path(target).write_text(json.dumps({"minutes": minutes, "seed": seed, **found}, indent=1) + "\n")
    return int(not found["held"])


def spend(folder: Path, minutes: float, seed: int, people: int, at_once: int) -> dict[str, Any]:
    """A day; what is to be told of it."""
    with world(folder, at_once) as here:
        os.environ.update(here.objects.environment)
        nights = Nights(here, 120)
        nights.grow()
        references = prepare(here)
        with ExitStack() as stack:
            models = [stack.enter_context(served(here, f"models:/{name}@challenger")) for name in SERVED]
            clients = []
            for uri in models:
                first = {kind: ask(uri, question(here, kind)).json() for kind in QUESTIONS}
                clients += [Client(here, uri, len(clients) + number, first) for number in range(THREADS)]
            here.say(f"{minutes:g} minutes, {people} people, {at_once} jobs at once")
            crowd = [Person(here, number, seed, references) for number in range(people)]
            searcher, race = Searcher(here), Race(here)
            troubles = Troubles(here, seed, min(60.0, 60 * minutes / (len(KINDS) + 2)))
            hurting = begin(here, troubles)
            threads = [begin(here, work) for work in (*crowd, nights, searcher, race, *clients)]
            time.sleep(60 * minutes)
            troubles.end()
            hurting.join()
            here.say("what was begun is finished")
            here.over.set()
            deadline = time.monotonic() + LAST
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    here.wrong.append("what was begun did not end")
                    break
        if not race.runs:
            here.wrong.append("no two promotions raced")
        look(here)
        told = tell(here, crowd, clients, nights, searcher, race, troubles)
        mark = here.head.env[MARK]
    left = marked(mark)
    if left:
        here.wrong.append(f"{len(left)} processes are left")
    told["processes left"] = len(left)
    return {"held": not here.wrong, **told, "wrong": here.wrong}


def begin(here: World, work: Callable[[], None]) -> threading.Thread:
    def whole() -> None:
        try:
            work()
        except Exception as error:
            here.wrong.append(f"{type(work).__name__} of the day broke: {type(error).__name__}: {error}")

    thread = threading.Thread(target=whole, name=type(work).__name__, daemon=True)
    thread.start()
    return thread


def prepare(here: World) -> dict[int, str]:
    """The dataset, two models that are served, two versions that race, and the undisturbed runs: seed -> weights."""

    def whole(*command: str) -> None:
        ended = here.submit("morning", *command)
        if ended.code != 0:
            raise RuntimeError(f"{ended.command} ended with {ended.code} before anything was disturbed:\n{ended.log}")

    whole("jobs.ingest", "data=glyphs", f"data.root={DATASETS}", "data.source.classes=60", "data.source.per_class=10")
    how = {f"served-{name}": [*how, f"register_as={name}"] for name, how in SERVED.items()}
    how |= {f"raced-{seed}": ["method=prototypical", f"register_as={RACED}", f"seed={seed}"] for seed in (0, 1)}
    jobs = [["jobs.train", *SMALL, *keys, *here.tracking, f"name={name}", "evaluation=null"]
            for name, keys in how.items()]  # fmt: skip
    jobs += [["jobs.train", *TRAIN, "tracking=none", f"name=undisturbed-{seed}", f"seed={seed}"] for seed in SEEDS]
    with ThreadPoolExecutor() as pool:  # as many at once as the day allows
        list(pool.map(lambda job: whole(*job), jobs))
    return {seed: weights_of(f"{RUNS}/undisturbed-{seed}") for seed in SEEDS}


def look(here: World) -> None:
    """At what must not be there: locks, two champions, temporary files, tracebacks, secrets."""
    client = MlflowClient(here.server.uri)
    experiments = {e.name for e in client.search_experiments(view_type=ViewType.ACTIVE_ONLY)}
    if not experiments <= {"Default", "few-shot"}:
        here.wrong.append(f"locks are left: {sorted(experiments - {'Default', 'few-shot'})}")
    models = {model.name: model for model in client.search_registered_models()}
    if not models.keys() <= {*SERVED, RACED, "people", "searched"}:
        here.wrong.append(f"registered models that nobody made: {sorted(models)}")
    for name in ("people", RACED):
        if name in models and "champion" not in models[name].aliases:
            here.wrong.append(f"there is no champion of {name}")
    s3 = boto3.client("s3", endpoint_url=here.objects.endpoint, aws_access_key_id="x", aws_secret_access_key="x")
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    names = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    partial = [name for name in names if ".partial" in name]
    partial += [str(path) for path in here.cache.rglob("*.partial-*")]
    if partial:
        here.wrong.append(f"temporary files are left: {partial[:3]}")
    for ended in here.ended:
        if STACK.search(ended.log):
            here.wrong.append(f"a traceback in the log of job {ended.number}: {ended.command[:120]}")
        if here.secret in ended.log:
            here.wrong.append(f"a secret in the log of job {ended.number}")
    session = Path(here.head.env["RAY_TMPDIR"])
    for log in [*session.rglob("worker-*.out"), *session.rglob("worker-*.err"), *here.folder.glob("*.log")]:
        if log.is_file() and here.secret in log.read_text(errors="replace"):
            here.wrong.append(f"a secret in {log.name}")


def tell(here: World, crowd: list[Person], clients: list[Client], nights: Nights, searcher: Searcher, race: Race,
         troubles: Troubles) -> dict[str, Any]:  # fmt: skip
    codes = Counter("driver killed" if e.hurt else f"{e.code}" for e in here.ended)
    return {
        "jobs": len(here.ended),
        "status of the jobs": dict(codes.most_common()),
        "troubles": dict(sorted(troubles.done.items())),
        "runs with the weights of undisturbed ones": sum(len(person.runs) for person in crowd),
        "jobs asked to end": sum(ended.asked for ended in here.ended),
        "retrainings": nights.done,
        "campaign": "ended" if searcher.found else "NOT ended",
        "races of promotions": race.runs,
        "of which the slower one was refused": race.refused,
        "answers of served models": sum(client.asked - client.refused for client in clients),
        "wrong questions refused": sum(client.refused for client in clients),
        "what was wrong": len(here.wrong),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
