"""Easy tasks in which an untrained network is misled, and tasks of every awkward shape."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.batch import Episodes, Images
from pipeline.methods.base import Method

CLASSES, SIDE = 40, 6
SIGNAL, NUISANCE = 6, 20  # dimensions in which classes differ, and in which images of one class do


def _basis() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    square = torch.randn(SIDE * SIDE, SIDE * SIDE, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square)[0].float()


def drawn(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Images [..., 1, 6, 6] of classes 0..39 [...]: the class shows in six directions, noise is strong in twenty."""
    centres = torch.randn(CLASSES, SIGNAL, generator=torch.Generator().manual_seed(8))
    noise = torch.randn(*labels.shape, NUISANCE, generator=generator) * 2.5
    x = torch.cat([centres[labels], noise, torch.zeros(*labels.shape, SIDE * SIDE - SIGNAL - NUISANCE)], -1)
    return (x @ _basis().T).unflatten(-1, (1, SIDE, SIDE))


def episodes(seed: int, tasks: int = 8, way: int = 5, shot: int = 1, query: int = 4, first: int = 0) -> Episodes:
    """Tasks over classes ``first``..39."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.stack([torch.randperm(CLASSES - first, generator=generator)[:way] + first for _ in range(tasks)])
    labels = {k: torch.arange(way).repeat(n).expand(tasks, -1) for k, n in (("support", shot), ("query", query))}
    images = {k: drawn(classes.gather(1, v), generator) for k, v in labels.items()}
    return Episodes(images["support"], labels["support"], images["query"], labels["query"], classes, way)


def images(seed: int, size: int = 64) -> Images:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    return Images(drawn(labels, generator), labels)


def accuracy(method: Method, shot: int = 1) -> float:
    """Of the method in evaluation, on 60 tasks that training does not see."""
    batch = episodes(10_000, tasks=60, shot=shot)
    was = method.training
    with torch.no_grad():
        logits = method.eval().classify(method.adapt(batch.support, batch.support_labels, batch.way), batch.query)
    method.train(was)
    return (logits.argmax(-1) == batch.query_labels).double().mean().item()


def train(method: Method, steps: int = 80, lr: float = 5e-3) -> None:
    groups = [{"params": g["params"], "lr": lr * g.get("lr_scale", 1.0)} for g in method.parameter_groups()]
    optimizer = torch.optim.Adam(groups)
    method.train()
    for step in range(steps):
        torch.manual_seed(step)
        loss, _ = method(images(step) if method.regime == "classical" else episodes(step))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
        optimizer.step()
        method.after_step()


def awkward(seed: int = 0, dtype: torch.dtype = torch.float64) -> Episodes:
    """Three tasks of four classes: unequal shots in a shuffled order, unequal queries, and padding (-1) among both."""
    generator = torch.Generator().manual_seed(seed)
    support = [[3, 0, 1, 1, 2, 0, 1, -1], [2, 2, 2, 0, 1, 3, -1, -1], [1, 0, 3, 2, 3, 3, 0, 2]]
    query = [[0, 1, 1, 2, 3, -1], [3, 3, 3, 3, 0, 1], [2, -1, -1, 0, 1, 1]]
    images = [torch.randn(3, n, 1, SIDE, SIDE, generator=generator, dtype=dtype) for n in (8, 6)]
    return Episodes(
        images[0], torch.tensor(support), images[1], torch.tensor(query), torch.arange(4).expand(3, 4), way=4
    )


def one(batch: Episodes, task: int) -> tuple[Episodes, Tensor, Tensor]:
    """A task by itself, without its padding; and which support images and queries it keeps."""
    s, q = batch.support_labels[task] >= 0, batch.query_labels[task] >= 0
    alone = Episodes(
        batch.support[task][s][None], batch.support_labels[task][s][None], batch.query[task][q][None],
        batch.query_labels[task][q][None], batch.classes[task : task + 1], batch.way,
    )  # fmt: skip
    return alone, s, q
