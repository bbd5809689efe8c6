"""Training steps on two cores, against easyfsl, learn2learn and TorchOpt on the same cores."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from docs.studies.benchmark import made
from docs.studies.benchmark.apart import Apart, Together
from docs.studies.benchmark.gpu import available, step_seconds, timed
from docs.studies.benchmark.rows import Bench, Finding, ratio, row
from docs.studies.benchmark.step import prototypical_steps
from docs.studies.benchmark.timing import interleaved, repeatedly
from docs.studies.peers.peers import peer
from pipeline.batch import Episodes

INNER_STEPS, INNER_LR = 5, 0.4
NETS = {"pooled": "conv4", "strided": "conv4_strided"}


# --- prototypical networks -----------------------------------------------------------------------------------------


def conv4() -> nn.Module:
    """Conv-4-64 as everybody writes it."""
    layers: list[nn.Module] = []
    for channels in (1, 64, 64, 64):
        layers += [nn.Conv2d(channels, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten())


def easyfsl_steps(steps: int, episodes: int = 1, clock: Callable[[], float] = time.process_time) -> Iterator[float]:
    """Seconds a step of so many episodes, one after the other."""
    torch.manual_seed(0)
    method = peer("easyfsl.methods").PrototypicalNetworks(conv4())
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3)
    batch = made.episodes(episodes, made.OMNIGLOT, way=20, shot=5, query=15)
    method.train()

    def step() -> None:
        optimizer.zero_grad()
        tasks = zip(batch.support, batch.support_labels, batch.query, batch.query_labels, strict=True)
        for support, labels, query, query_labels in tasks:
            method.process_support_set(support, labels)
            (F.cross_entropy(method(query), query_labels) / episodes).backward()
        optimizer.step()

    return repeatedly(step, steps, clock)


@row("step")
def prototypical_easyfsl(bench: Bench) -> Iterator[Finding]:
    """A prototypical step against easyfsl's."""
    peer("easyfsl")
    steps, what = bench.count(4), "prototypical step, 20-way 5-shot 15-query, Conv-4-64, against easyfsl"
    with Apart(prototypical_steps, steps, product=True) as ours, Apart(easyfsl_steps, steps) as theirs:
        found = interleaved({"easyfsl": theirs, "method=prototypical": ours}, bench.repetitions)
    yield ratio(f"{what}, one core", _ms(found), ("easyfsl", "method=prototypical"), "CPU ms", least=1.4)
    with (
        _workers(bench, "prototypical", 20, 5, 15, 2, "conv4", {}, steps) as workers,
        Apart(easyfsl_steps, steps, 2, time.perf_counter, threads=2) as theirs,
    ):
        found = interleaved({"easyfsl, two threads": theirs, "two workers": workers}, bench.repetitions)
    yield ratio(
        f"{what}, two episodes on two cores", _ms(found), ("easyfsl, two threads", "two workers"), "ms", least=1.4
    )


# --- MAML ----------------------------------------------------------------------------------------------------------


def learn2learn_steps(net: str, query: int, tasks: int, steps: int, device: str = "cpu") -> Iterator[float]:
    """Seconds a meta-step as its examples write it: clone, adapt, backward, task after task."""
    l2l = peer("learn2learn")
    torch.manual_seed(0)
    maml = l2l.algorithms.MAML(_network(net), lr=INNER_LR, first_order=False).to(device)
    optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
    batch = made.episodes(tasks, made.OMNIGLOT, query=query).to(device)

    def step() -> None:
        optimizer.zero_grad()
        for support, labels, questions, answers in _tasks(batch):
            learner = maml.clone()
            for _ in range(INNER_STEPS):
                learner.adapt(F.cross_entropy(learner(support), labels))
            F.cross_entropy(learner(questions), answers).backward()
        for parameter in maml.parameters():
            parameter.grad.mul_(1 / tasks)
        optimizer.step()

    while True:
        yield timed(step, steps, device)


def torchopt_steps(net: str, query: int, tasks: int, steps: int) -> Iterator[float]:
    """Seconds a meta-step with its differentiable SGD, task after task."""
    torchopt = peer("torchopt")
    torch.manual_seed(0)
    network = _network(net)
    inner = torchopt.MetaSGD(network, lr=INNER_LR)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    batch = made.episodes(tasks, made.OMNIGLOT, query=query)

    def step() -> None:
        optimizer.zero_grad()
        states = [torchopt.extract_state_dict(part, by="reference") for part in (network, inner)]
        for support, labels, questions, answers in _tasks(batch):
            for _ in range(INNER_STEPS):
                inner.step(F.cross_entropy(network(support), labels))
            (F.cross_entropy(network(questions), answers) / tasks).backward()
            for part, state in zip((network, inner), states, strict=True):
                torchopt.recover_state_dict(part, state)
        optimizer.step()

    return repeatedly(step, steps)


def _network(net: str) -> nn.Module:
    if net == "strided":
        return peer("learn2learn").vision.models.OmniglotCNN(5)
    base = peer("learn2learn.vision.models.cnn4").ConvBase(hidden=64, channels=1, max_pool=True, layers=4)
    return nn.Sequential(base, nn.Flatten(), nn.Linear(64, 5))


def _tasks(batch: Episodes) -> Iterator[Any]:
    return zip(batch.support, batch.support_labels, batch.query, batch.query_labels, strict=True)


def _against_learn2learn(bench: Bench, net: str, query: int, tasks: int, least: float) -> Iterator[Finding]:
    peer("learn2learn")
    steps, options = bench.count(16 // tasks or 1), {"inner_steps": INNER_STEPS}
    tasks = bench.count(tasks, 2) // 2 * 2
    with (
        _workers(bench, "maml", 5, 1, query, tasks, NETS[net], options, steps) as workers,
        Apart(learn2learn_steps, net, query, tasks, steps, threads=2) as theirs,
    ):
        found = interleaved({"learn2learn, two threads": theirs, "two workers": workers}, bench.repetitions)
    yield ratio(
        f"MAML second-order meta-step of {tasks}, {net} Conv-4-64, 5-way 1-shot {query}-query, 5 inner steps, "
        "against learn2learn",
        _ms(found), ("learn2learn, two threads", "two workers"), "ms", least=least,
    )  # fmt: skip


@row("step")
def maml_pooled(bench: Bench) -> Iterator[Finding]:
    """MAML with a pooled network against learn2learn."""
    for tasks in (8, 32):
        yield from _against_learn2learn(bench, "pooled", 15, tasks, 1.5)


@row("step")
def maml_strided(bench: Bench) -> Iterator[Finding]:
    """MAML with its strided network against learn2learn."""
    for tasks in (8, 32):
        yield from _against_learn2learn(bench, "strided", 15, tasks, 2.0)
    yield from _against_learn2learn(bench, "strided", 1, 32, 2.0)  # as many queries as shots: the paper's recipe


@row("step")
def maml_torchopt(bench: Bench) -> Iterator[Finding]:
    """MAML against TorchOpt."""
    peer("torchopt"), peer("learn2learn")
    tasks, steps = bench.count(8, 2) // 2 * 2, bench.count(2)
    with (
        _workers(bench, "maml", 5, 1, 15, tasks, "conv4", {"inner_steps": INNER_STEPS}, steps) as workers,
        Apart(torchopt_steps, "pooled", 15, tasks, steps, threads=2) as theirs,
    ):
        found = interleaved({"TorchOpt, two threads": theirs, "two workers": workers}, bench.repetitions)
    yield ratio(
        f"the same meta-step of {tasks}, pooled, against TorchOpt's MetaSGD",
        _ms(found), ("TorchOpt, two threads", "two workers"), "ms",
    )  # fmt: skip


@row("gpu")
def gpu_maml_learn2learn(bench: Bench) -> Iterator[Finding]:
    """MAML by vmap on a GPU against learn2learn, meta-batch 32."""
    device, steps = available(bench), bench.count(5)
    peer("learn2learn")
    options = {"inner_steps": INNER_STEPS, "inner_loop": "vmap"}
    with (
        Apart(_gpu_steps, device, steps, options) as ours,
        Apart(learn2learn_steps, "pooled", 15, 32, steps, device) as theirs,
    ):
        found = interleaved({"learn2learn": theirs, "vmap": ours}, bench.repetitions)
    yield ratio(
        "MAML second-order meta-step of 32 on a GPU, pooled Conv-4-64, 5 inner steps, vmap against learn2learn",
        _ms(found), ("learn2learn", "vmap"), "ms", least=5,
    )  # fmt: skip


def _gpu_steps(device: str, steps: int, options: dict[str, Any]) -> Iterator[float]:
    return step_seconds(device, steps, "maml", 32, made.OMNIGLOT, False, **options)


# --- as the product runs it on two cores -----------------------------------------------------------------------------


def worker_steps(
    rank: int, meeting: str, method: str, form: tuple[int, int, int], tasks: int, net: str, options: dict[str, Any],
    steps: int,
) -> Iterator[float]:  # fmt: skip
    """Seconds a step of one of two DDP workers, which has half of the tasks."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    way, shot, query = form
    backbone = {"strided": net == "conv4_strided"}
    model = made.model(method, made.OMNIGLOT, way, shot, backbone=backbone, **options).train()
    module = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batch = made.episodes(tasks // 2, made.OMNIGLOT, way, shot, query, seed=rank)

    def step() -> None:
        loss, _ = module(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    try:
        yield from repeatedly(step, steps)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _workers(
    bench: Bench,
    method: str,
    way: int,
    shot: int,
    query: int,
    tasks: int,
    net: str,
    options: dict[str, Any],
    steps: int,
) -> Iterator[Together]:
    meeting = bench.folder / "meeting"
    Path(meeting).unlink(missing_ok=True)
    arguments = (str(meeting), method, (way, shot, query), tasks, net, options, steps)
    with (
        Apart(worker_steps, 0, *arguments, product=True) as first,
        Apart(worker_steps, 1, *arguments, product=True) as second,
    ):
        yield Together([first, second])


def _ms(found: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [1e3 * value for value in values] for name, values in found.items()}
