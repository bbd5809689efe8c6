"""What a method keeps of all training images: every checkpoint has it of its own weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.data.batches import local_batches
from pipeline.data.dataset import Dataset, class_table
from pipeline.evaluation.embedded import embed_part
from pipeline.methods.baseline import Baseline
from pipeline.training.learner import Learner, make_deterministic
from pipeline.training.loop import Hooks, make_planner, survey, train
from pipeline.training.prepare import prepare
from pipeline.training.workers import Alone

ROOT = Path(__file__).resolve().parents[2]
METHOD = f"{__name__}.Keeping"


class Keeping(Baseline):
    """The mean feature of every training class, and the number of images."""

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__(backbone, classes)
        self.classes = classes
        self.register_buffer("means", torch.zeros(classes, int(backbone.out_features)))
        self.register_buffer("images", torch.zeros(()))

    def summarise(self, features: Tensor, labels: Tensor) -> Tensor:
        assert not self.training
        members = (labels == torch.arange(self.classes).unsqueeze(-1)).double()
        return torch.cat([members @ features.double(), members.sum(1, keepdim=True)], dim=1)

    def keep_summary(self, total: Tensor, images: int) -> None:
        self.means.copy_(total[:, :-1] / total[:, -1:])
        self.images.fill_(images)


def own(small_run, *overrides: str) -> dict:
    return {**small_run("baseline", "train.batch_size=24", *overrides), "method": {"name": METHOD}}


def expected(learner: Learner, dataset: Dataset) -> tuple[Tensor, int]:
    """Class by class and image by image, in float64."""
    how = learner.config.train
    table = class_table(dataset.manifest, how.split, "kept", how.holdout)
    method, means = learner.method.eval(), []
    assert len(dataset.manifest.rotations) == 1
    for start, count in zip(table.starts, table.counts, strict=True):
        images = learner.preprocess(torch.from_numpy(dataset.gather(np.arange(start, start + count))))
        with torch.no_grad():
            means.append(torch.stack([method.backbone(image[None])[0].double() for image in images]).mean(0))
    method.train()
    return torch.stack(means), int(table.counts.sum())


@pytest.mark.parametrize("holdout", [0.0, 0.2])
def test_every_checkpoint_has_its_own(small_run, holdout):
    config, _, run = prepare(own(small_run, f"train.holdout={holdout}"))
    make_deterministic(1, config.deterministic)
    learner, dataset = Learner(config, run.spec), Dataset(config.dataset_uri)
    seen: list[tuple[int, Tensor]] = []

    def save(learner: Learner) -> None:
        kept = learner.checkpoint(run.config, run.dataset).model
        want, images = expected(learner, dataset)
        torch.testing.assert_close(kept["means"].double(), want, rtol=1e-5, atol=1e-5)
        assert kept["images"] == images
        seen.append((learner.step, kept["means"].clone()))

    planner = make_planner(config, dataset.manifest, learner.method)
    stream = local_batches(dataset, planner, 0, config.steps)
    train(learner, stream, dataset, planner.per_step, hooks=Hooks(save=save))
    assert [step for step, _ in seen] == [4, 6, 8, 12]  # checkpoints in between, and those that are validated
    assert not torch.allclose(seen[1][1], seen[3][1], atol=1e-3)


def test_images_go_through_in_the_batches_of_any_other_embedding(small_run):
    """Which matters where an image's answer depends on those beside it."""
    config, _, run = prepare(own(small_run, "backbone.norm=batch_statistics"))
    learner, dataset = Learner(config, run.spec), Dataset(config.dataset_uri)
    table = class_table(dataset.manifest, "train", "kept", config.train.holdout)
    whole = range(int(table.counts.sum()))
    assert len(whole) > 700, "several batches"
    survey(learner, dataset, Alone())
    method = learner.method.eval()
    features = embed_part(method.backbone, learner.preprocess, dataset, table, whole, learner.device)
    means = [part.mean(0) for part in np.split(features.astype(np.float64), np.cumsum(table.counts)[:-1])]
    torch.testing.assert_close(method.means, torch.tensor(np.stack(means)).float(), rtol=1e-6, atol=1e-6)


def worker(rank: int, folder: Path, raw: dict) -> None:
    from torch.nn.parallel import DistributedDataParallel

    from pipeline.training.worker import Distributed

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    config, _, run = prepare(raw)
    learner, dataset = Learner(config, run.spec, rank), Dataset(config.dataset_uri)
    learner.module = DistributedDataParallel(learner.module)
    planner = make_planner(config, dataset.manifest, learner.method)
    stream = local_batches(dataset, planner, 0, config.steps, rank, 2)
    train(learner, stream, dataset, planner.per_step, Distributed(torch.device("cpu")))
    torch.save((learner.method.state_dict(), *(expected(learner, dataset) if rank == 0 else ())), folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_workers_have_the_first_ones(small_run, tmp_path):
    import json

    (tmp_path / "run.json").write_text(json.dumps(own(small_run, "steps=3")))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __name__, str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [p.communicate(timeout=240)[1] for p in processes]
        assert [p.returncode for p in processes] == [0, 0], "\n".join(errors)
    finally:
        for p in processes:
            p.kill()
    (first, want, _), (second,) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in first.items():  # all are the checkpoint, and validate it: batch-norm's averages too
        assert torch.equal(value, second[name]), name
    torch.testing.assert_close(first["means"].double(), want, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    import json

    given = Path(sys.argv[1])
    worker(int(sys.argv[2]), given, json.loads((given / "run.json").read_text()))
