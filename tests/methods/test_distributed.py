"""Meta-gradients through DistributedDataParallel: two processes with half the tasks each are one with all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.batch import Episodes
from pipeline.model import build_model

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "second_order": {"name": "maml", "inner_steps": 2},
    "first_order": {"name": "maml", "inner_steps": 2, "first_order": True, "transductive": False},
    "vmap": {"name": "maml", "inner_steps": 2, "inner_loop": "vmap"},
    "anil": {"name": "maml", "adapt_parameters": "head"},
    "prototypical": {"name": "prototypical", "learn_scale": True},
}


def model(key: str):
    torch.manual_seed(0)
    backbone = {"name": "conv4", "width": [3, 4], "norm": "batch_statistics"}
    spec = {"method": METHODS[key], "backbone": backbone, "input": {"shape": [1, 8, 8]}, "way": 3}
    return build_model(spec).double()


def tasks(first: int, last: int) -> Episodes:
    generator = torch.Generator().manual_seed(1)
    support = torch.randn(4, 6, 1, 8, 8, generator=generator, dtype=torch.float64)
    query = torch.randn(4, 9, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels, query_labels = torch.arange(3).repeat(4, 2), torch.arange(3).repeat(4, 3)
    part = slice(first, last)
    classes = torch.arange(3).expand(4, 3)
    return Episodes(support[part], labels[part], query[part], query_labels[part], classes[part], 3)


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for key in METHODS:
        ddp = torch.nn.parallel.DistributedDataParallel(model(key))
        loss, _ = ddp(tasks(2 * rank, 2 * rank + 2))
        loss.backward()
        torch.save({n: p.grad for n, p in ddp.module.named_parameters()}, folder / f"{key}.{rank}.pt")
    torch.distributed.barrier()  # neither leaves while the other still reads
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    try:
        errors = [p.communicate(timeout=240)[1] for p in processes]
        assert [p.returncode for p in processes] == [0, 0], "\n".join(errors)
    finally:
        for p in processes:
            p.kill()
    for key in METHODS:
        single = model(key)
        # Batch statistics of a joint forward are per process: the mean of the halves is what DDP computes.
        sum(single(tasks(t, t + 2))[0] / 2 for t in (0, 2)).backward()
        for rank in range(2):
            gradients = torch.load(tmp_path / f"{key}.{rank}.pt", weights_only=True)
            for name, parameter in single.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-12, msg=f"{key} {name}")
        if METHODS[key]["name"] == "maml":  # tasks are independent: also the gradient of all four at once
            whole = model(key)
            whole(tasks(0, 4))[0].backward()
            for a, b in zip(whole.parameters(), single.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


if __name__ == "__main__":
    worker(int(sys.argv[2]), Path(sys.argv[1]))
