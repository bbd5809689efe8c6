"""Where a group of workers goes on, and how they leave together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import store
from pipeline.config import compose
from pipeline.data.batches import local_batches
from pipeline.data.dataset import Dataset
from pipeline.errors import PipelineError
from pipeline.model import build_model
from pipeline.training.checkpoint import (
    Checkpoint,
    Corrupt,
    begin_with,
    free_name,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
)
from pipeline.training.learner import Learner, make_deterministic
from pipeline.training.loop import Hooks, make_planner, train
from pipeline.training.preemption import Signal
from pipeline.training.prepare import prepare
from pipeline.training.runs import checkpoints
from pipeline.training.workers import Alone

from .conftest import METHODS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A folder with checkpoints of steps 10, 20 and 30."""
    for step in (10, 20, 30):
        weights = {"weight": torch.full((4,), float(step))}
        entry = {"step": float(step), "val/accuracy": 0.5}
        found = Checkpoint(step, {}, {}, {}, {"val/accuracy": 0.5}, [entry], weights, weights)
        save_checkpoint(tmp_path / f"step_{step:08d}", found)
    return str(tmp_path)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("backbone", ["conv4", "resnet12"])
def test_counters_begin_anew_with_another_s_weights(tmp_path: Path, method: str, backbone: str) -> None:
    """Adam's moments of Reptile are no schedule: they answer too, and go with their number."""
    given = [override for override in METHODS[method] if not override.startswith("backbone")]
    backbone = {"relation": "relation_encoder", "conditionally_shifted": "conv4"}.get(method, backbone)
    raw = compose("train", [*given, f"backbone={backbone}"])
    about = {"way": 5, "shot": 1, "classes": 5, "input": {"shape": [1, 28, 28], "scaling": "unit"}}
    made = build_model({"method": raw["method"], "backbone": raw["backbone"], **about})
    model = {name: torch.full_like(tensor, 7) for name, tensor in made.state_dict().items()}
    save_checkpoint(tmp_path, Checkpoint(7, {}, {}, {}, {}, [], model))
    begin_with(made, str(tmp_path))
    for name, buffer in made.named_buffers():
        if not buffer.is_floating_point():
            assert int(buffer) == (7 if name == "moment_steps" else 0), name
    made.load_state_dict(model)
    assert all(int(buffer) == 7 for buffer in made.buffers() if not buffer.is_floating_point())


def test_rows_for_every_inner_step_begin_with_the_one_of_another_method(tmp_path: Path) -> None:
    about = {"backbone": {"name": "conv4", "width": 8}, "way": 5, "input": {"shape": [1, 28, 28]}}
    plain, stepped = (build_model({**about, "method": {"name": n}}) for n in ("prototypical", "maml_plus_plus"))
    model = {name: torch.rand(tensor.shape) for name, tensor in plain.state_dict().items()}
    save_checkpoint(tmp_path, Checkpoint(7, {}, {}, {}, {}, [], model))
    assert not [name for name in begin_with(stepped, str(tmp_path)) if name.startswith("backbone.")]
    for name, parameter in stepped.backbone.named_parameters():
        assert parameter.shape == ((5, 8) if "norms" in name else parameter.shape)
        assert torch.equal(parameter, model[f"backbone.{name}"].expand_as(parameter)), name


def damage(run: str, step: int, name: str = "model.safetensors") -> None:
    path = Path(run, f"step_{step:08d}", name)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def test_the_newest_is_taken_and_nothing_newer(run):
    said: list[str] = []
    assert newest_whole(run, "step_00000030", Alone(), said.append).step == 30
    assert newest_whole(run, "step_00000020", Alone(), said.append).step == 20, "Ray Train knows of no newer one"
    assert not said


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_corrupt_one_is_passed_over_and_said(run, name):
    damage(run, 30, name)
    said: list[str] = []
    found = newest_whole(run, "step_00000030", Alone(), said.append)
    assert found.step == 20 and torch.equal(found.model["weight"], torch.full((4,), 20.0))
    assert len(said) == 1 and "step_00000030" in said[0] and "goes on from step 20" in said[0]
    assert [uri[-2:] for uri in checkpoints(run)] == ["10", "20"], "nobody takes it for a checkpoint any more"
    assert free_name(run, 30) == "step_00000030.2" and free_name(run, 20) == "step_00000020"


def test_a_figure_that_is_another_is_damage(run):
    path = Path(run, "step_00000030", "state.json")
    state = json.loads(path.read_text())
    state["history"][0]["val/accuracy"] = 0.9
    path.write_text(json.dumps(state))
    with pytest.raises(Corrupt, match="state.json is not as it was written"):
        load_checkpoint(str(path.parent))


def test_a_file_that_is_missing(run):
    Path(run, "step_00000030", "optimizer.safetensors").unlink()
    with pytest.raises(Corrupt, match=r"it has no optimizer\.safetensors"):
        load_checkpoint(f"{run}/step_00000030")
    assert newest_whole(run, "step_00000030", Alone(), print).step == 20


def test_what_was_altered_on_its_way_is_read_again(run, monkeypatch):
    read, altered = store.read_bytes, []

    def once_altered(uri: str) -> bytes:
        content = read(uri)
        if uri.endswith("model.safetensors") and not altered:
            altered.append(uri)
            return content[:-1] + bytes([content[-1] ^ 1])
        return content

    monkeypatch.setattr(store, "read_bytes", once_altered)
    assert newest_whole(run, "step_00000030", Alone(), pytest.fail).step == 30 and altered


def test_none_that_is_whole(run):
    for step in (10, 20, 30):
        damage(run, step)
    with pytest.raises(PipelineError, match="no other checkpoint of the run is whole"):
        newest_whole(run, "step_00000030", Alone(), print)


WORKER = """
import json, sys, torch.distributed as dist
from pipeline.training.preemption import Preemption, Signal
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
preemption, given = Preemption(2), []
for step in range(1, 13):
    if step == 4 and rank == 1:
        preemption.hear(Signal.SAVE)
    if step == 8 and rank == 0:
        preemption.hear(Signal.LEAVE)
    signal = preemption()
    if signal:
        given.append([step, int(signal)])
    if signal is Signal.LEAVE:
        break
print(json.dumps(given))
dist.barrier()
dist.destroy_process_group()
"""


def test_the_workers_hear_a_signal_at_the_same_step(tmp_path):
    """One step after the first of them has heard it; each signal once."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    given = [json.loads(worker.communicate(timeout=240)[0]) for worker in workers]
    assert given[0] == given[1] == [[5, Signal.SAVE], [9, Signal.LEAVE]]


def test_a_run_that_goes_on_from_the_checkpoint_before_ends_with_the_same_bits(small_run, tmp_path):
    """Trained to step 9 without Ray, its last checkpoint damaged, and trained on by another learner to the end."""
    config, _, run = prepare(small_run("prototypical", "name=whole", "cluster.workers=1", "checkpoint.every=2"))
    make_deterministic(1, True)
    dataset, folder = Dataset(config.dataset_uri), str(tmp_path / "run")

    def learn(first: int, last: int) -> Learner:
        learner = Learner(config, run.spec)
        if first:
            learner.restore(newest_whole(folder, "step_00000008", Alone(), said.append))
        planner = make_planner(config, dataset.manifest, learner.method)
        stream = local_batches(dataset, planner, learner.step, last - learner.step)
        save = Hooks(
            save=lambda it: save_checkpoint(f"{folder}/step_{it.step:08d}", it.checkpoint(run.config, run.dataset))
        )
        train(learner, stream, dataset, planner.per_step, hooks=save)
        return learner

    said: list[str] = []
    learn(0, 9)
    damage(folder, 8)
    resumed = learn(8, config.steps)
    assert "goes on from step 6" in said[0]
    whole = learn(0, config.steps)
    for (name, a), (_, b) in zip(whole.method.state_dict().items(), resumed.method.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
