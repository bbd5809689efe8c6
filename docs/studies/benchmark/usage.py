"""What processes use: CPU time of a whole tree, and private memory at its peak."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

import psutil

INTERVAL = 0.05  # seconds between two looks at memory


def cpu_seconds(process: psutil.Process | None = None) -> float:
    """CPU time of a process (this one) and of all below it, with those that have ended."""
    root = process or psutil.Process()
    total = 0.0
    for one in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            t = one.cpu_times()
            total += t.user + t.system + getattr(t, "children_user", 0.0) + getattr(t, "children_system", 0.0)
    return total


def private_bytes(process: psutil.Process) -> int:
    """Memory of the process's own: not the files that it maps, such as the shards of a dataset."""
    used = process.memory_info()
    return int(used.rss - getattr(used, "shared", 0))


class Peak:
    """The largest private memory of the processes that ``find`` names, while within."""

    def __init__(self, find: Callable[[], Iterable[psutil.Process]]) -> None:
        self.bytes: dict[int, int] = {}  # by process
        self._find = find
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def most(self) -> int:
        return max(self.bytes.values(), default=0)

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            for process in self._find():
                with contextlib.suppress(psutil.Error):
                    self.bytes[process.pid] = max(self.bytes.get(process.pid, 0), private_bytes(process))


def training_workers() -> Iterator[psutil.Process]:
    """Ray Train's workers below this process."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "TrainWorker" in " ".join(process.cmdline()):
                yield process
