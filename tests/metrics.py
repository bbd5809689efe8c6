"""What the nodes of the running Ray export for Prometheus."""

from __future__ import annotations

import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable

import ray

_SAMPLE = re.compile(r"^(?P<name>\w+)\{(?P<labels>.*)\} (?P<value>\S+)$")


def exported(**labels: str) -> dict[str, list[float]]:
    """Name -> values of all samples that carry the labels, over all nodes."""
    found: dict[str, list[float]] = defaultdict(list)
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                sample = _SAMPLE.match(line)
                if sample and all(f'{key}="{value}"' in sample["labels"] for key, value in labels.items()):
                    found[sample["name"]].append(float(sample["value"]))
    return dict(found)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until it holds; Ray exports what was set about every ten seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.5)
