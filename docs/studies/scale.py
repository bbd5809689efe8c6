"""What ``jobs.scale`` does: a page on what a cluster would wait for, from what is measured on this machine."""

from __future__ import annotations

import platform
import statistics
import time
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from docs.studies.scale_model import GB, GBIT, GIB, Machines, Step, all_reduce, demands, first_to_saturate, start
from docs.studies.scale_plan import Simulated, simulate
from pipeline import store
from pipeline.batch import Episodes
from pipeline.config import Config, Section, compose, validate
from pipeline.data.episodes import EpisodeSpec
from pipeline.errors import PipelineError
from pipeline.model import build_model
from pipeline.tables import markdown_table
from pipeline.training.config import Count, Positive

Sizes = Annotated[list[Count], Field(min_length=1)]


class Simulation(Section):
    classes: Sizes
    images: Sizes
    episodes: Count
    shard_mb: Count
    cached: list[Annotated[Positive, Field(le=1)]]


class ScaleConfig(Section):
    shape: Annotated[list[Count], Field(min_length=3, max_length=3)]
    way: Count
    shot: Count
    query: Count
    tasks: Count
    method: dict[str, Any]
    backbones: Annotated[list[str], Field(min_length=1)]
    repetitions: Count
    device: str | None
    faster: Positive
    gpus: Sizes
    gpus_per_node: Count
    images: Sizes
    network_gbit: Annotated[list[Positive], Field(min_length=1)]
    latency_us: Positive
    store_gbit: Positive
    disk_gb_s: Positive
    disk_gib: Positive
    memory_gib: Positive
    cpus_per_gpu: Count
    simulation: Simulation
    output: str | None


def scale(raw: Config) -> dict[str, Any]:
    """Measure, reckon, print; ``output`` keeps the page."""
    config = validate(ScaleConfig, raw)
    if config.output:
        store.check_output(config.output, "output")
    sizes = list(zip(config.simulation.classes, config.simulation.images, strict=False))
    if len(config.simulation.classes) != len(config.simulation.images):
        raise PipelineError("simulation.classes and simulation.images must be as many: a dataset each")
    for classes, images in sizes:
        if classes < config.way or images // classes < config.shot + config.query:
            raise PipelineError(f"simulation: {images} images of {classes} classes cannot serve an episode")
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    spec = EpisodeSpec(config.way, config.shot, config.query, config.tasks)
    image = int(np.prod(config.shape))
    rows = max(1, config.simulation.shard_mb * 2**20 // image)
    simulated = [
        simulate(classes, images, spec, config.simulation.episodes, rows, config.simulation.cached)
        for classes, images in sizes
    ]
    steps = {name: _measure(config, name, device, simulated[-1].plan_seconds) for name in config.backbones}
    page = _page(config, device, steps, simulated)
    print(page)
    if config.output:
        store.write_bytes(config.output, page.encode())
    return {
        "device": device,
        "steps": {k: vars(v) for k, v in steps.items()},
        "simulated": [vars(s) for s in simulated],
    }


def _measure(config: ScaleConfig, backbone: str, device: str, planning: float) -> Step:
    """A training step of ``tasks`` episodes on a batch that is there already: seconds of the GPU, or CPU seconds of one
    thread, where a step of one episode is measured and taken ``tasks`` times."""
    options = compose("train", [f"backbone={backbone}"])
    method = build_model(
        {
            "method": config.method,
            "backbone": options["backbone"],
            "input": {"shape": config.shape, "scaling": "none"},
            "way": config.way,
            "shot": config.shot,
            "classes": 64,
        }
    )
    if method.regime != "episodic":
        raise PipelineError(f"method={config.method['name']} is not trained on episodes alone; choose one that is")
    torch.set_num_threads(1)
    method = method.to(device).train()
    support, query = config.way * config.shot, config.way * config.query
    labels = torch.arange(config.way, device=device)
    episodes = 1 if device == "cpu" else config.tasks
    batch = Episodes(
        support=torch.rand(episodes, support, *config.shape, device=device),
        support_labels=labels.repeat_interleave(config.shot).expand(episodes, -1),
        query=torch.rand(episodes, query, *config.shape, device=device),
        query_labels=labels.repeat_interleave(config.query).expand(episodes, -1),
        classes=labels.expand(episodes, -1),
        way=config.way,
    )
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3)
    clock = time.process_time if device == "cpu" else time.perf_counter
    times = []
    for _ in range(config.repetitions + 1):  # the first warms up
        began = clock()
        loss, _ = method(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(clock() - began)
    gradient = sum(p.numel() * p.element_size() for p in method.parameters() if p.requires_grad)
    data = config.tasks * (support + query) * int(np.prod(config.shape))
    seconds = statistics.median(times[1:]) * config.tasks / episodes / config.faster
    return Step(seconds, gradient, data, config.tasks * planning)


def _machines(config: ScaleConfig, gpus: int, network: float) -> Machines:
    return Machines(
        gpus, config.gpus_per_node, network * GBIT, config.latency_us * 1e-6, config.store_gbit * GBIT,
        config.disk_gb_s * GB, config.disk_gib * GIB, config.memory_gib * GIB, config.cpus_per_gpu,
    )  # fmt: skip


def _page(config: ScaleConfig, device: str, steps: dict[str, Step], simulated: list[Simulated]) -> str:
    image = int(np.prod(config.shape))
    where = torch.cuda.get_device_name() if device != "cpu" else f"one core ({platform.machine()}), CPU seconds"
    shape = "×".join(map(str, config.shape))
    parts = [
        "# Scale, on paper",
        f"`python -m jobs.scale`: steps of `{config.method['name']}` with {config.tasks} episodes a GPU, "
        f"{config.way}-way {config.shot}-shot with {config.query} queries, images {shape}, measured on {where}"
        + (f", taken to be {config.faster:g} times as fast on one GPU" if config.faster != 1 else "")
        + ". Everything else is reckoned from the keys of `pipeline/conf/scale.yaml`; give your own figures there. "
        "A GPU that computes faster waits sooner: measure on yours, or set `faster`.",
        "## A step on one GPU",
        markdown_table(
            ["backbone", "step, s", "gradients, MB", "pixels, MB", "planning, CPU ms"],
            [
                [n, f"{s.compute:.3g}", f"{s.gradient / 1e6:.2f}", f"{s.data / 1e6:.2f}", f"{1e3 * s.planning:.2f}"]
                for n, s in steps.items()
            ],
        ),
        "## Time of the all-reduce",
        f"Ring: 2 (n-1)/n of the gradients through each GPU's link, and 2 log2 n messages of {config.latency_us:g} µs. "
        "In brackets the share of a step, were nothing of it hidden behind the backward pass.",
        _network_table(config, steps),
        "## What saturates first",
        f"A node has {config.gpus_per_node} GPUs, {config.memory_gib:g} GiB of memory, {config.disk_gib:g} GiB of disk "
        f"that reads {config.disk_gb_s:g} GB/s, and gets {config.store_gbit:g} Gbit/s from the store; GPUs talk at "
        f"{config.network_gbit[0]:g} Gbit/s. The figure is the part's time over that of computing: above 1 the "
        "GPUs wait for it. *the GPUs*: nothing does yet. *disk space*: the dataset does not fit a node, which keeps a "
        "copy of all shards; split it, encode it, or take larger disks.",
        _saturation_table(config, steps, image),
        "## The episode plan and a cache of shards",
        f"{config.simulation.episodes:,} episodes, planned 64 at a time, and followed through a "
        f"cache of shards of {config.simulation.shard_mb} MiB that forgets what was not used for longest. A plan costs "
        "the same whatever the dataset's size, but for the table of its classes, 24 bytes each. Since classes are "
        "drawn uniformly, a cache answers about the share of requests that it holds of the shards: there is no small "
        "hot part to keep.",
        _simulation_table(simulated),
    ]
    return "\n\n".join(parts) + "\n"


def _network_table(config: ScaleConfig, steps: dict[str, Step]) -> str:
    rows = []
    for name, step in steps.items():
        for gpus in config.gpus:
            row = [name, f"{gpus:,}"]
            for network in config.network_gbit:
                seconds = all_reduce(step.gradient, gpus, network * GBIT, config.latency_us * 1e-6)
                row.append(f"{1e3 * seconds:.2f} ms ({100 * seconds / (seconds + step.compute):.2g} %)")
            rows.append(row)
    return markdown_table(["backbone", "GPUs", *(f"{n:g} Gbit/s" for n in config.network_gbit)], rows)


def _saturation_table(config: ScaleConfig, steps: dict[str, Step], image: int) -> str:
    rows = []
    for name, step in steps.items():
        for gpus in config.gpus:
            for images in config.images:
                machines = _machines(config, gpus, config.network_gbit[0])
                dataset = float(images) * image
                demand = demands(step, dataset, machines)
                copy = start(dataset, machines)
                shares = [f"{demand[key]:.2g}" for key in ("network", "disk", "cpu", "capacity")]
                first = first_to_saturate(demand)
                rows.append([name, f"{gpus:,}", f"{images:,}", *shares, f"{copy / 60:.2g}" if copy else "", first])
    header = ["backbone", "GPUs", "images", "all-reduce", "reading", "planning", "disk filled", "copy, min", "first"]
    return markdown_table(header, rows)


def _simulation_table(simulated: list[Simulated]) -> str:
    shares = list(simulated[0].hits)
    header = ["classes", "images", "plan, CPU µs an episode", "memory of a plan, kB", "table of classes, MB", "shards",
              "shards an episode", *(f"hits of {100 * share:g} %" for share in shares)]  # fmt: skip
    rows = [
        [
            f"{s.classes:,}", f"{s.images:,}", f"{1e6 * s.plan_seconds:.1f}", f"{s.plan_bytes / 1e3:.0f}",
            f"{s.table_bytes / 1e6:.3g}", f"{s.shards:,}", f"{s.shards_an_episode:.2f}",
            *(f"{100 * s.hits[share]:.1f} %" for share in shares),
        ]
        for s in simulated
    ]  # fmt: skip
    return markdown_table(header, rows)
