"""What is killed or taken away during a day, once in a while and drawn by a seed."""

from __future__ import annotations

import random
import subprocess
import threading
from contextlib import suppress

import psutil

from tests.cluster.day.world import JOB, World

KINDS = ("driver", "worker", "node", "mlflow", "store", "disk")
AWAY = 12.0  # seconds that something is away


class Troubles:
    """A shuffled round of all kinds, then another: each comes as often as the others."""

    def __init__(self, world: World, seed: int, every: float) -> None:
        self.world, self.every, self._draw = world, every, random.Random(seed)
        self.done: dict[str, int] = {}
        self.calm = threading.Event()  # nothing more is hurt

    def __call__(self) -> None:
        round_: list[str] = []
        while not self.calm.wait(self.every):
            if not round_:
                round_ = self._draw.sample(KINDS, len(KINDS))
            kind = round_.pop()
            try:
                if getattr(self, kind)() is not False:
                    self.done[kind] = self.done.get(kind, 0) + 1
                    self.world.say(f"*** {kind}")
            except (psutil.Error, OSError, IndexError):  # what it was to hurt was just being started
                self.world.say(f"*** {kind}: nothing there to hurt")

    def driver(self) -> None:
        drivers = [p for p in self.world.processes("python -m jobs.") if p.cmdline()[0].endswith("python")]
        victim = self._draw.choice(sorted(drivers, key=lambda p: p.pid))
        self.world.hurt.add(victim.environ()[JOB])
        victim.kill()

    def worker(self) -> None:
        self._draw.choice(sorted(self.world.processes("RayTrainWorker"), key=lambda p: p.pid)).kill()

    def node(self) -> None:
        self.world.kill_node()
        self.calm.wait(AWAY)
        self.world.start_node()

    def mlflow(self) -> None:
        self.world.server.stop()
        self.calm.wait(AWAY)
        self.world.server.start()

    def store(self) -> None:
        self.world.objects.fail({"match": ".", "kind": "status", "seconds": AWAY})

    def disk(self) -> bool | None:
        """The shards' cache on a disk of 16 kB; False where this machine mounts nothing."""
        place = str(self.world.cache)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", place], capture_output=True).returncode:
            return False
        self.calm.wait(AWAY)
        subprocess.run(["umount", "-l", place], check=True)
        return None

    def end(self) -> None:
        self.calm.set()
        with suppress(OSError):
            self.world.objects.fail()
