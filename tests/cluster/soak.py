"""A training that is given a random fault a minute: python -m tests.cluster.soak [minutes=60] [seed=0] [--json FILE]

Trains on two nodes and a store for so many minutes while, once a minute, a worker is killed, a node is killed and
replaced, the store fails for ten seconds, or a shard is altered on its way. Every half minute it notes memory, open
files, shared memory and processes of the cluster. Then it holds the weights of a checkpoint against those of an
untouched training of as many steps, and fails where they differ, where something grew, or where a process stayed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from pipeline.data.sources.glyphs import draw_glyphs
from pipeline.data.write import write_dataset
from pipeline.errors import Stopped
from pipeline.tables import text_table
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.launch import launch
from pipeline.training.prepare import prepare
from pipeline.training.runs import Run, checkpoints
from tests.cluster.bed import TASKS, Bed, fill_store, final
from tests.cluster.consumed import check_once, planned, read_groups
from tests.cluster.nodes import Nodes, environment_for, object_store, workers_of

EVERY, SAMPLE = 60.0, 30.0  # seconds between faults, and between samples
EVERY_STEPS = 100  # between checkpoints
GROWTH = 1.3  # the last quarter's median over the second quarter's, at most


class Soak:
    def __init__(self, bed: Bed, seed: int) -> None:
        self.bed, self.draw = bed, random.Random(seed)
        self.faults: list[dict[str, Any]] = []
        self.samples: list[dict[str, float]] = []
        self.over = threading.Event()
        self.began = time.monotonic()

    def hurt(self) -> None:
        """A random fault a minute."""
        while not self.over.wait(EVERY):
            kind = self.draw.choice(["worker", "node", "store", "shard"])
            try:
                getattr(self, kind)()
                self.faults.append({"at": round(time.monotonic() - self.began), "fault": kind})
                print(f"{self.faults[-1]['at']:>5} s  {kind}", flush=True)
            except (psutil.Error, OSError, IndexError) as error:  # what it was to hurt was just being started
                print(f"       {kind}: nothing there to hurt ({type(error).__name__})", flush=True)

    def worker(self) -> None:
        workers = [worker for node in self.bed.nodes.nodes for worker in workers_of(node)]
        os.kill(self.draw.choice(workers).pid, signal.SIGKILL)

    def node(self) -> None:
        self.bed.nodes.kill(self.draw.choice(self.bed.nodes.nodes))
        self.bed.nodes.replace(2)

    def store(self) -> None:
        self.bed.store.fail({"match": ".", "kind": "status", "seconds": 10.0})

    def shard(self) -> None:
        """At the next start of the workers."""
        self.bed.forget_shards()
        self.bed.store.fail({"match": r"GET [^?]*shard-\w+\.arrow", "kind": "flip", "times": 1})
        self.worker()

    def watch(self) -> None:
        while not self.over.wait(SAMPLE):
            self.samples.append(sample())


def sample() -> dict[str, float]:
    """What this process and all its children use now."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    memory, files = 0, 0
    for process in processes:
        try:
            memory += process.memory_info().rss - process.memory_info().shared
            files += process.num_fds()
        except psutil.Error:
            continue
    shared = sum(path.stat().st_blocks * 512 for path in Path("/dev/shm").rglob("*") if path.is_file())
    return {"memory_mb": memory / 2**20, "files": files, "shared_mb": shared / 2**20, "processes": len(processes)}


def grew(samples: list[dict[str, float]]) -> list[str]:
    """What the last quarter has more of than the second, by medians."""
    if len(samples) < 12:
        return []
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    middles = {key: [float(np.median([s[key] for s in part])) for part in (early, late)] for key in samples[0]}
    return [f"{key}: {a:.0f} -> {b:.0f}" for key, (a, b) in middles.items() if b > GROWTH * a]


def main(arguments: list[str]) -> int:
    target = arguments[arguments.index("--json") + 1] if "--json" in arguments else None
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    minutes = float(options.get("minutes", 60))
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="soak") as folder, object_store() as objects:
        environment = environment_for(objects)
        os.environ.update(environment)
        names = [f"glyph{number:04d}" for number in range(140)]
        splits = {"train": names[:60], "val": names[60:100], "test": names[100:]}
        datasets = f"{folder}/datasets"
        write_dataset(f"{datasets}/glyphs", "glyphs", zip(names, draw_glyphs(np.arange(140)), strict=True), splits)
        fill_store(datasets)
        notes = Path(folder, "notes")
        notes.mkdir()
        nodes = Nodes(Path(folder, "nodes"), environment)
        before = {process.pid for process in psutil.Process().children(recursive=True)}
        try:
            nodes.start(2)
            soak = Soak(Bed(nodes, objects, datasets, notes), int(options.get("seed", 0)))
            print(text := f"{minutes:g} minutes, a fault a minute", flush=True)
            run = soak_run(soak, minutes)
            result = judge(soak, run)
        finally:
            nodes.stop()
        left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before and p.is_running()]
        result["processes left"] = [" ".join(p.cmdline())[:80] for p in left] or "none"
        result["held"] = result["held"] and not left
        print(text_table(["what", "found"], [[key, str(value)] for key, value in result.items()]))
        if target:
            Path(target).write_text(json.dumps({"asked": text, **result, "samples": soak.samples}, indent=1) + "\n")
        return int(not result["held"])


def soak_run(soak: Soak, minutes: float) -> Run:
    """Train until the time is over; then the job is asked to leave, which it does with a checkpoint."""
    overrides = ["steps=100000000", "+method.pause=0.15", "cluster.restarts=100000", f"checkpoint.every={EVERY_STEPS}",
                 "checkpoint.keep=2", "validation.every=200", "log_every=50"]  # fmt: skip
    config, _, run = prepare(soak.bed.config("soak", *overrides))
    threads = [threading.Thread(target=work, daemon=True) for work in (soak.hurt, soak.watch)]
    for thread in threads:
        thread.start()
    end = threading.Timer(60 * minutes, lambda: (soak.over.set(), os.kill(os.getpid(), signal.SIGTERM)))
    end.start()
    try:
        launch(config, run)
    except Stopped as stopped:
        print(stopped, flush=True)
    finally:
        end.cancel()
        soak.over.set()
    return run


def judge(soak: Soak, run: Run) -> dict[str, Any]:
    """The run against an untouched one of as many steps, on the same nodes."""
    bed = soak.bed
    bed.store.fail()
    last = load_checkpoint(checkpoints(run.uri)[-1])
    long = [f"steps={last.step}", "checkpoint.every=1000000", "validation.every=200", "log_every=50"]
    whole, _ = bed.train("soak-untouched", *long)
    reference = final(whole)
    same = all(torch.equal(reference.model[name], value) for name, value in last.model.items())
    # Workers that died shortly before the end may have been further than the last checkpoint.
    plan = planned(bed.config("plan", f"steps={last.step + 10 * EVERY_STEPS}"), bed.datasets)
    groups, episodes = [], "each once a step"
    try:
        groups = [group for group in read_groups(bed.notes / "soak", plan, TASKS) if group.taken]
        check_once(groups, last.step, TASKS)
    except (AssertionError, KeyError) as error:  # said beside all the others: the run took an hour
        episodes = f"NOT each once a step: {type(error).__name__}: {error}"
    growth = grew(soak.samples)
    kinds = [fault["fault"] for fault in soak.faults]
    return {
        "held": same and not growth and episodes.startswith("each"),
        "steps": last.step,
        "faults": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "starts of the workers": len(groups),
        "weights": "bit for bit those of an untouched run" if same else "OTHERS than those of an untouched run",
        "episodes": episodes,
        "grew": growth or "nothing",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
