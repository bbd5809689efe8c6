"""How long a step takes on a cluster, and what its parts are asked to carry: arithmetic, without measuring."""

from __future__ import annotations

import math
from dataclasses import dataclass

GBIT, GB, GIB = 1e9 / 8, 1e9, 2.0**30


@dataclass(frozen=True)
class Step:
    """What one GPU does in a step."""

    compute: float  # seconds
    gradient: int  # bytes, which all GPUs add up
    data: int  # bytes of pixels
    planning: float  # CPU seconds


@dataclass(frozen=True)
class Machines:
    """What a cluster offers."""

    gpus: int
    gpus_per_node: int
    network: float  # bytes a second of each GPU to the others
    latency: float  # seconds of a message
    store: float  # bytes a second, from the object store to a node
    disk_rate: float  # bytes a second, at random, of a node
    disk: float  # bytes of a node
    memory: float  # bytes of a node
    cpus_per_gpu: int


def all_reduce(gradient: int, gpus: int, network: float, latency: float) -> float:
    """Seconds to add up ``gradient`` bytes over all GPUs: a ring moves 2 (n - 1)/n of them through every link, and a
    message passes 2 log2 n hops of a tree (what libraries choose for small messages)."""
    if gpus == 1:
        return 0.0
    return 2 * (gpus - 1) / gpus * gradient / network + 2 * math.ceil(math.log2(gpus)) * latency


def demands(step: Step, dataset: float, machines: Machines) -> dict[str, float]:
    """Every part's time over the time of computing, at full speed: above 1 it is what the GPUs wait for.

    ``network``: the all-reduce, were it not hidden behind the backward pass. ``disk``: pixels read by a node whose
    memory does not hold the dataset, the share that it does hold left out. ``cpu``: planning. ``capacity``: the
    dataset over the disk of a node, as every node keeps a copy.
    """
    node = min(machines.gpus_per_node, machines.gpus)
    missing = max(0.0, 1 - machines.memory / dataset)
    return {
        "network": all_reduce(step.gradient, machines.gpus, machines.network, machines.latency) / step.compute,
        "disk": node * step.data * missing / machines.disk_rate / step.compute,
        "cpu": step.planning / machines.cpus_per_gpu / step.compute,
        "capacity": dataset / machines.disk,
    }


def first_to_saturate(demand: dict[str, float]) -> str:
    """What the cluster runs into first: a disk that is too small before anything that is too slow. Where nothing is,
    how much faster the GPUs may be until something is."""
    if demand["capacity"] > 1:
        return "disk space"
    name = max(("network", "disk", "cpu"), key=lambda key: demand[key])
    part = {"network": "all-reduce", "disk": "reading", "cpu": "planning"}[name]
    if demand[name] > 1:
        return part
    faster = float(f"{1 / demand[name]:.2g}")
    return f"the GPUs; {part}, once they are {faster:,.0f} times as fast"


def start(dataset: float, machines: Machines) -> float:
    """Seconds until a node has its copy of the dataset; 0 where it cannot keep one."""
    return dataset / machines.store if dataset <= machines.disk else 0.0
