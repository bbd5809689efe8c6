"""Every method under DistributedDataParallel: two processes take steps without a word, and end with equal weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3


def worker(rank: int, folder: Path) -> None:
    from torch.nn.parallel import DistributedDataParallel

    from pipeline.data.batches import local_batches
    from pipeline.data.dataset import Dataset
    from pipeline.training.learner import Learner
    from pipeline.training.loop import make_planner
    from pipeline.training.prepare import prepare

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name, raw in json.loads((folder / "runs.json").read_text()).items():
        config, _, run = prepare(raw)
        learner, dataset = Learner(config, run.spec, rank), Dataset(config.dataset_uri)
        both = learner.method.regime == "both"
        learner.module = DistributedDataParallel(learner.module, find_unused_parameters=both)
        planner = make_planner(config, dataset.manifest, learner.method)
        try:
            for _, batch in local_batches(dataset, planner, 0, STEPS, rank, 2):
                figures = learner.train_step(batch)
            assert figures["loss"].isfinite()
        except Exception as error:  # of which method
            raise RuntimeError(f"{name}: {error}") from error
        torch.save(dict(learner.method.named_parameters()), folder / f"{name}.{rank}.pt")
    torch.distributed.barrier()  # neither leaves while the other still reads
    torch.distributed.destroy_process_group()


def test_every_method(small_run, tmp_path):
    from .conftest import METHODS

    runs = {name: small_run(name, f"steps={STEPS}", f"name={name}") for name in METHODS}
    (tmp_path / "runs.json").write_text(json.dumps(runs))
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
    for name in METHODS:
        first, second = (torch.load(tmp_path / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1))
        for key, value in first.items():
            assert torch.equal(value, second[key]), (name, key)


if __name__ == "__main__":
    worker(int(sys.argv[2]), Path(sys.argv[1]))
